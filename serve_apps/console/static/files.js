// Sends the chosen file, as it is, and shows how much has gone.
{
  const form = document.getElementById("send");
  const progress = document.getElementById("progress");
  const message = document.getElementById("message");
  const headers = { ...JSON.parse(document.body.getAttribute("hx-headers")), "HX-Request": "true" };

  // The server's words come as an element; the browser's own are text.
  const tell = (text) => {
    if (text.trim().startsWith("<")) message.innerHTML = text;
    else message.replaceChildren(Object.assign(document.createElement("div"), { className: "alert alert-danger", textContent: text }));
    message.scrollIntoView();
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    const file = form.file.files[0];
    const fields = new URLSearchParams({ filename: file.name, purpose: form.purpose.value });
    const request = new XMLHttpRequest();
    message.replaceChildren();
    button.disabled = true;
    request.open("PUT", `${form.dataset.files}?${fields}`);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.addEventListener("progress", ({ loaded, total }) => {
      progress.textContent = `${file.name}: ${Math.floor((100 * loaded) / total)} %`;
    });
    const failed = (text) => {
      progress.textContent = "Not sent.";
      button.disabled = false;
      tell(text);
    };
    request.addEventListener("load", () => {
      if (request.status < 300) location.assign(request.getResponseHeader("HX-Redirect"));
      else failed(request.responseText);
    });
    request.addEventListener("error", () => failed("The connection broke; send the file again."));
    request.send(file);
  });
}
