// Parts of a page that are asked for again: every 3 s, after a failure after twice the time, up to a minute.
for (const part of document.querySelectorAll("[data-live]")) {
  const shortest = 3000;
  const longest = 60000;
  let wait = shortest;
  const look = async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch(part.dataset.live, { headers: { "HX-Request": "true" } });
        if (answer.status === 401) return location.reload();
        if (!answer.ok) throw new Error(answer.status);
        part.innerHTML = await answer.text();
        htmx.process(part);
        wait = shortest;
      } catch {
        wait = Math.min(2 * wait, longest);
      }
    }
    setTimeout(look, wait);
  };
  setTimeout(look, wait);
}

// Promotion: the form's fields make the address, after a question.
document.addEventListener("submit", (event) => {
  const form = event.target.closest("[data-promote]");
  if (!form) return;
  event.preventDefault();
  const { alias, version } = Object.fromEntries(new FormData(form));
  if (!window.confirm(`Point ${alias} at version ${version}?`)) return;
  const address = form.dataset.promote.replace("ALIAS", encodeURIComponent(alias)).replace("VERSION", version);
  htmx.ajax("POST", address, { source: form, swap: "none" });
});
