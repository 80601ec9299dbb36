// Sends the chosen files of an adapter one by one, then asks for a version. An upload that is refused is
// deleted; one whose answer did not come is continued when it is sent again, since the server may have published it.
{
  const form = document.getElementById("upload");
  const drop = document.getElementById("drop");
  const list = document.getElementById("chosen");
  const progress = document.getElementById("progress");
  const message = document.getElementById("message");
  const headers = { ...JSON.parse(document.body.getAttribute("hx-headers")), "HX-Request": "true" };
  const patterns = form.dataset.files.split(" ").map(
    (glob) => new RegExp(`^${glob.replaceAll(".", "\\.").replaceAll("*", ".*")}$`),
  );
  let chosen = new Map(); // name → file
  let upload = null; // begun, neither published nor refused: its id, and the names of its files that have come

  const choose = (files) => {
    const taken = files.filter((file) => patterns.some((pattern) => pattern.test(file.name)));
    upload = null;
    chosen = new Map(taken.map((file) => [file.name, file]));
    const line = (text) => Object.assign(document.createElement("li"), { textContent: text });
    const left = files.length - taken.length;
    list.replaceChildren(...taken.map((file) => line(`${file.name}, ${file.size.toLocaleString("en")} bytes`)));
    if (left) list.append(line(`${left} left out: no files of an adapter`));
  };

  // Of a folder, the files directly in it; a reader gives at most a hundred entries at once.
  const filesOf = async (entry) => {
    if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
    const reader = entry.createReader();
    const files = [];
    for (;;) {
      const entries = await new Promise((done, failed) => reader.readEntries(done, failed));
      if (!entries.length) return files;
      for (const inner of entries) if (inner.isFile) files.push(...(await filesOf(inner)));
    }
  };

  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
    });
  }
  drop.addEventListener("drop", async (event) => {
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    const files = entries.length ? (await Promise.all(entries.map(filesOf))).flat() : [...event.dataTransfer.files];
    choose(files);
  });
  for (const id of ["folder", "files"]) {
    const field = document.getElementById(id);
    field.addEventListener("change", () => {
      const isDirectly = (file) => file.webkitRelativePath.split("/").length <= 2;
      choose([...field.files].filter(isDirectly));
    });
  }

  const send = async (method, path, body, type) => {
    const more = type ? { "Content-Type": type } : {};
    const answer = await fetch(form.dataset.uploads + path, { method, body, headers: { ...headers, ...more } });
    if (!answer.ok) throw Object.assign(new Error(await answer.text()), { status: answer.status });
    return answer;
  };

  // The server's words come as an element; the browser's own are text.
  const tell = (text) => {
    if (text.trim().startsWith("<")) message.innerHTML = text;
    else message.replaceChildren(Object.assign(document.createElement("div"), { className: "alert alert-danger", textContent: text }));
    message.scrollIntoView();
  };

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    message.replaceChildren();
    button.disabled = true;
    let current = upload;
    try {
      if (current === null) {
        const { id } = await (await send("POST", "")).json();
        upload = current = { id, sent: new Set() };
      }
      const { id, sent } = current;
      let number = 0;
      for (const [name, file] of chosen) {
        progress.textContent = `${name}, ${++number} of ${chosen.size}`;
        if (sent.has(name)) continue;
        await send("PUT", `/${id}/files/${encodeURIComponent(name)}`, file, "application/octet-stream");
        sent.add(name);
      }
      progress.textContent = "The server checks the folder";
      const fields = new URLSearchParams(new FormData(form));
      const answer = await send("POST", `/${id}/publish`, fields, "application/x-www-form-urlencoded");
      location.assign(answer.headers.get("HX-Redirect"));
    } catch (error) {
      const isRefused = error.status >= 400 && error.status < 500;
      if (isRefused && upload === current) upload = null;
      progress.textContent = upload === null ? "" : "Not finished: Publish continues this upload.";
      button.disabled = false;
      tell(error.message);
      if (isRefused && current !== null) await send("DELETE", `/${current.id}`).catch(() => null);
    }
  });
}
