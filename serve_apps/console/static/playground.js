// Asks every chosen model at once and shows each answer as it comes.
{
  const form = document.getElementById("playground");
  const answers = document.getElementById("answers");
  const token = JSON.parse(document.body.getAttribute("hx-headers"));

  const body = (model) => ({
    model,
    messages: [{ role: "user", content: form.elements.prompt.value }],
    max_tokens: Number(form.elements.max_tokens.value),
    temperature: Number(form.elements.temperature.value),
    ...(form.elements.logprobs.checked ? { logprobs: true, top_logprobs: 4 } : {}),
  });

  // Python's literal of a value of JSON.
  const literal = (value) => {
    if (value === true || value === false) return value ? "True" : "False";
    if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
    if (typeof value !== "object") return JSON.stringify(value);
    return `{${Object.entries(value).map(([name, inner]) => `${JSON.stringify(name)}: ${literal(inner)}`).join(", ")}}`;
  };

  // A model's name may hold no quote, but a message may: JSON for curl is in single quotes, which end and begin again.
  const show = () => {
    const model = answers.querySelector("input").value;
    const text = JSON.stringify(body(model), null, 1).replaceAll("'", "'\\''");
    const key = '"Authorization: Bearer $LORAY_API_KEY"';
    document.getElementById("curl").textContent =
      `curl ${location.origin}/v1/chat/completions -H "Content-Type: application/json" -H ${key} -d '${text}'`;
    document.getElementById("python").textContent =
      "import os\nfrom openai import OpenAI\n\n" +
      `client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ.get("LORAY_API_KEY", "none"))\n` +
      `answer = client.chat.completions.create(**${literal(body(model))})\n` +
      "print(answer.choices[0].message.content)";
  };

  const percent = (logprob) => `${(100 * Math.exp(logprob)).toPrecision(3)} %`;
  const others = (token) =>
    (token.top_logprobs ?? [])
      .filter((other) => other.token !== token.token)
      .map((other) => `${JSON.stringify(other.token)} ${percent(other.logprob)}`);

  // A piece of text whose tokens are known: each tells its probability where the pointer is on it, and in the table.
  // Tokens of no text, such as those around a thought, are in the table alone.
  const write = (said, rows, piece, tokens) => {
    const isWhole = tokens.map((token) => token.token).join("") === piece;
    for (const token of tokens) {
      const row = rows.insertRow();
      for (const text of [JSON.stringify(token.token), percent(token.logprob), others(token).join(", ")]) {
        row.insertCell().textContent = text;
      }
    }
    if (!piece) return;
    for (const part of isWhole ? tokens.map((token) => [token]) : [tokens]) {
      const span = document.createElement("span");
      span.className = part.some((token) => Math.exp(token.logprob) < 0.5) ? "token unlikely" : "token";
      span.textContent = isWhole ? part[0].token : piece;
      span.title = part
        .map((token) => [`${JSON.stringify(token.token)} ${percent(token.logprob)}`, ...others(token)].join("\n"))
        .join("\n\n");
      said.append(span);
    }
  };

  const tierOf = async (model) => {
    try {
      const answer = await fetch(`${form.dataset.tier}?model=${encodeURIComponent(model)}`);
      return (await answer.json()).tier;
    } catch {
      return "";
    }
  };

  const clear = (card) => {
    for (const place of card.querySelectorAll(".said, .thought-text, .figures-line")) place.textContent = "";
    card.querySelector("tbody").replaceChildren();
    for (const details of card.querySelectorAll("details")) details.hidden = true;
  };

  const ask = async (card) => {
    const said = card.querySelector(".said");
    const figures = card.querySelector(".figures-line");
    const details = card.querySelector(".tokens");
    const rows = details.querySelector("tbody");
    const thought = card.querySelector(".thought");
    const thoughtText = card.querySelector(".thought-text");
    clear(card);
    const tier = await tierOf(card.querySelector("input").value);
    const began = performance.now();
    let first = null;
    let count = 0;
    const take = (line) => {
      if (!line.startsWith("data: ") || line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      const thinks = Boolean(choice?.delta?.reasoning);
      const piece = choice?.delta?.reasoning || choice?.delta?.content;
      const tokens = choice?.logprobs?.content ?? [];
      if (piece) first ??= performance.now();
      if (thinks && thought.hidden) {
        thought.hidden = false;
        thought.open = true; // until the answer begins, unless it is closed before
      } else if (piece && !thinks && !said.hasChildNodes()) {
        thought.open = false;
      }
      const place = thinks ? thoughtText : said;
      if (tokens.length) {
        details.hidden = false;
        write(place, rows, piece ?? "", tokens);
      } else if (piece) {
        place.append(piece);
      }
      count = event.usage?.completion_tokens ?? count;
    };
    try {
      const options = { stream: true, stream_options: { include_usage: true } };
      const answer = await fetch(form.dataset.chat, {
        method: "POST",
        headers: { ...token, "Content-Type": "application/json", "HX-Request": "true" },
        body: JSON.stringify({ ...body(card.querySelector("input").value), ...options }),
      });
      if (!answer.ok) {
        const text = await answer.text();
        let message = new DOMParser().parseFromString(text, "text/html").body.textContent.trim();
        try {
          message = JSON.parse(text).error.message;
        } catch {}
        throw new Error(message || answer.statusText);
      }
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        lines.forEach(take);
      }
      const ended = performance.now();
      const pace = count > 1 && first !== null ? ((count - 1) * 1000) / Math.max(ended - first, 1) : null;
      figures.textContent = [
        `${count} tokens`,
        first === null ? "no text" : `first after ${Math.round(first - began)} ms`,
        pace === null ? "" : `${pace.toFixed(1)} tokens/s`,
        tier && `adapter ${tier} when asked`,
      ].filter(Boolean).join(" · ");
    } catch (error) {
      figures.textContent = error.message;
    }
  };

  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    show();
    answers.querySelectorAll(".answer").forEach(ask);
  });
  document.getElementById("another").addEventListener("click", () => {
    const last = answers.lastElementChild;
    const card = last.cloneNode(true);
    card.setAttribute("aria-label", `Answer ${answers.children.length + 1}`);
    clear(card);
    card.querySelector("input").value = "";
    answers.append(card);
    card.querySelector("input").focus();
  });
  show();
}
