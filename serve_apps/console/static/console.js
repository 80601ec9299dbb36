// Curves: the first list is x, the others are drawn over it; after the first `solid` of them they are what these are
// compared with.
const short = (value) =>
  value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(1) : String(Number(value.toPrecision(6)));

function drawCurves(part) {
  for (const place of part.querySelectorAll("[data-curve]")) {
    const labels = JSON.parse(place.dataset.labels);
    const ink = getComputedStyle(document.body).color;
    const colours = [null, "#4299e1", "#f76707", "#2fb344", "#ae3ec9", "#868e96"];
    const solid = Number(place.dataset.solid ?? 2);
    const axis = { stroke: ink, grid: { stroke: "rgba(128, 128, 128, .25)" } };
    const values = (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick)));
    const options = {
      width: place.clientWidth,
      height: 256,
      scales: { x: { time: false } },
      axes: [axis, { ...axis, values, size: 60 }],
      series: labels.map((label, n) =>
        n ? { label, stroke: colours[n], width: 2, dash: n > solid ? [6, 4] : [], spanGaps: true } : { label },
      ),
    };
    place.plot = new uPlot(options, JSON.parse(place.dataset.curve), place);
  }
}
window.addEventListener("resize", () => {
  for (const place of document.querySelectorAll("[data-curve]")) {
    place.plot?.setSize({ width: place.clientWidth, height: 256 });
  }
});
drawCurves(document);
document.addEventListener("htmx:afterSwap", (event) => drawCurves(event.detail.target));

// What replaces a part of a page has its scrolling and its focus, where it has as many places for them.
function replacePart(part, text) {
  const scrolling = () => [...part.querySelectorAll(".table-responsive, pre.text")];
  const focusable = () => [...part.querySelectorAll("a, button, [tabindex]")];
  const scrolled = scrolling().map((place) => [place.scrollLeft, place.scrollTop]);
  const focused = focusable().indexOf(document.activeElement);
  const count = focusable().length;
  part.innerHTML = text;
  if (scrolling().length === scrolled.length) {
    scrolling().forEach((place, n) => ([place.scrollLeft, place.scrollTop] = scrolled[n]));
  }
  if (focused >= 0 && focusable().length === count) focusable()[focused].focus({ preventScroll: true });
}

// Parts of a page that are followed: a stream of events, each with the whole part. It ends now and then, and is asked for
// again after 3 s; after a failure, or a minute without a byte, after twice the time, up to a minute. What nobody sees is
// not followed.
for (const part of document.querySelectorAll("[data-live]")) {
  const shortest = 3000;
  const longest = 60000;
  const silent = 60000; // a look, which may wait for Ray, takes less
  let wait = shortest;

  const show = (text) => {
    for (const place of part.querySelectorAll("[data-curve]")) place.plot?.destroy();
    replacePart(part, text);
    htmx.process(part);
    drawCurves(part);
  };

  const follow = async () => {
    if (document.hidden) return document.addEventListener("visibilitychange", follow, { once: true });
    const left = new AbortController();
    const leave = () => document.hidden && left.abort();
    document.addEventListener("visibilitychange", leave);
    let timer;
    const hear = () => {
      clearTimeout(timer);
      timer = setTimeout(() => left.abort(), silent);
    };
    hear();
    try {
      const headers = { Accept: "text/event-stream", "HX-Request": "true" };
      const answer = await fetch(part.dataset.live, { headers, signal: left.signal });
      if (answer.status === 401) return location.reload();
      if (!answer.ok) throw new Error(answer.status);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        hear();
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        for (const event of events) if (event.startsWith("data: ")) show(JSON.parse(event.slice(6)));
        wait = shortest;
        if (part.querySelector("[data-ended]")) return left.abort();
      }
    } catch {
      wait = document.hidden ? shortest : Math.min(2 * wait, longest);
    } finally {
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", leave);
    }
    setTimeout(follow, document.hidden ? 0 : wait);
  };
  setTimeout(follow, wait);
}

// Promotion and canaries: the form's fields make the address, after a question.
document.addEventListener("submit", (event) => {
  const form = event.target.closest("[data-promote]");
  if (!form) return;
  event.preventDefault();
  const fields = Object.fromEntries(new FormData(form));
  const filled = (text, encode) => text.replace(/\{(\w+)\}/g, (_, field) => encode(fields[field]));
  if (!window.confirm(filled(form.dataset.question, String))) return;
  htmx.ajax("POST", filled(form.dataset.promote, encodeURIComponent), { source: form, swap: "none" });
});
