// Before the first paint: the chosen theme, else the system's.
(() => {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const dark = (localStorage.getItem("loray-theme") || (system.matches ? "dark" : "light")) === "dark";
    document.documentElement.setAttribute("data-bs-theme", dark ? "dark" : "light");
  };
  apply();
  system.addEventListener("change", apply);
  document.addEventListener("click", (event) => {
    if (event.target.closest("#theme")) {
      const dark = document.documentElement.getAttribute("data-bs-theme") === "dark";
      localStorage.setItem("loray-theme", dark ? "light" : "dark");
      apply();
    }
  });
})();
