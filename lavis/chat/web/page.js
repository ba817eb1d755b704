// The page's own script, with KNOWN from the server: images by button, paste and drop, taking one
// off, copying an answer, and what outlives a reload.

const lavis = {
  show: [],     // what `show` is to take over: names of uploads, or the key of an error
  discard: [],  // numbers of images to take off

  // Hand a value over to the server's event of this name; its hidden button reads it.
  press(name, value) {
    lavis[name].push(JSON.stringify(value));
    document.getElementById(name).click();
  },

  async take(files) {
    files = [...files];
    const bytes = files.reduce((sum, file) => sum + file.size, 0);
    if (!files.length) return;
    if (files.length > KNOWN.files) return lavis.press("show", "many_images");
    if (files.some(file => file.size > KNOWN.file_bytes)) return lavis.press("show", "large_file");
    if (bytes > KNOWN.upload_bytes) return lavis.press("show", "large_upload");
    const body = new FormData();
    files.forEach(file => body.append("files", file));
    const {root, api_prefix} = window.gradio_config;
    const done = await fetch(`${root}${api_prefix}/upload`, {method: "POST", body}).catch(() => null);
    const errors = {403: "no_cookie", 413: "large_upload"};
    lavis.press("show", done?.ok ? await done.json() : errors[done?.status] ?? "no_upload");
  },

  async copy(button) {
    const text = button.dataset.copy;
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // browsers have a clipboard on https and localhost only
      const area = document.body.appendChild(document.createElement("textarea"));
      area.value = text;
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1000);
  },

  choose(language) {
    document.cookie = `${KNOWN.cookie}=${language}; path=/; max-age=31536000; samesite=lax`;
  },

  // Stored when a page goes and taken out when the next one comes: a duplicated tab finds nothing.
  kept() {
    const kept = JSON.parse(sessionStorage.getItem("lavis") ?? '["", ""]');
    sessionStorage.removeItem("lavis");
    return kept;
  },

  save(text) {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  },
};

window.addEventListener("pagehide", () => {
  const held = document.querySelector("#held textarea")?.value ?? "";
  const question = document.querySelector("#question textarea")?.value ?? "";
  if (held || question) sessionStorage.setItem("lavis", JSON.stringify([held, question]));
});
window.addEventListener("pageshow", event => event.persisted && lavis.kept());

document.addEventListener("click", event => {
  const button = event.target.closest?.("button");
  if (!button) return;
  if (button.id === "add") document.getElementById("files").click();
  if (button.id === "toggle") document.documentElement.classList.toggle("settings-open");
  if (button.dataset.copy !== undefined) lavis.copy(button);
  if (button.dataset.discard) lavis.press("discard", Number(button.dataset.discard));
});

document.addEventListener("paste", event => {
  const {files, types} = event.clipboardData;
  if (!files.length || types.includes("text/plain")) return;  // tables come as text and picture
  event.preventDefault();
  lavis.take(files);
});
document.addEventListener("dragover", event => {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();
});
document.addEventListener("drop", event => {
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  lavis.take(event.dataTransfer.files);
});

lavis.start = () => {
  const files = Object.assign(document.createElement("input"), {
    id: "files", type: "file", multiple: true, accept: "image/*,.heic,.heif,video/*", hidden: true,
  });
  files.addEventListener("change", () => {
    lavis.take(files.files);
    files.value = "";
  });
  document.body.append(files);

  // What Gradio's own script says is English.
  new MutationObserver(() => {
    const words = KNOWN.words[document.querySelector("#head h1")?.lang] ?? {};
    document.querySelectorAll(".toast-wrap").forEach(toast => {
      const texts = document.createTreeWalker(toast, NodeFilter.SHOW_TEXT);
      while (texts.nextNode()) {
        const said = words[texts.currentNode.data.trim()];
        if (said && said !== texts.currentNode.data) texts.currentNode.data = said;
      }
    });
  }).observe(document.body, {childList: true, subtree: true});
};
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", lavis.start);
else lavis.start();
