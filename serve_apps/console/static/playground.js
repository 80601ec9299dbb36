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
  });

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
      `answer = client.chat.completions.create(**${JSON.stringify(body(model))})\n` +
      "print(answer.choices[0].message.content)";
  };

  const ask = async (card) => {
    const said = card.querySelector(".said");
    const figures = card.querySelector(".figures-line");
    said.textContent = figures.textContent = "";
    const began = performance.now();
    let first = null;
    let count = 0;
    const take = (line) => {
      if (!line.startsWith("data: ") || line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) {
        first ??= performance.now();
        said.textContent += piece;
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
    card.querySelector(".said").textContent = card.querySelector(".figures-line").textContent = "";
    card.querySelector("input").value = "";
    answers.append(card);
    card.querySelector("input").focus();
  });
  show();
}
