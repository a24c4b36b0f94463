// Paper has no clicks: every fold with text in it is open while the page is printed.
const folds = () => document.querySelectorAll("details.fold:not([open])");
addEventListener("beforeprint", () => folds().forEach((each) => { each.open = true; each.dataset.printed = ""; }));
addEventListener("afterprint", () => document.querySelectorAll("[data-printed]").forEach((each) => {
  each.open = false;
  delete each.dataset.printed;
}));
