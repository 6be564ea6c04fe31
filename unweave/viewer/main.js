// The report page. Every string of the data is hostile: it becomes text, never markup.
import { startChecks } from "./checks.js";
import { startCurve } from "./curve.js";
import { data, graphs, unit } from "./data.js";
import { $ } from "./dom.js";
import { redraw, startGraph } from "./graph.js";
import { startHeader } from "./header.js";
import { startKernels } from "./kernels.js";
import { startModules } from "./modules.js";
import { startNodePage } from "./nodepage.js";
import { startPanel } from "./panel.js";
import { startScatter } from "./scatter.js";
import { startEdges, startFaithfulness, startProof, startProvenance, startWorst } from "./tables.js";
import { startTips } from "./tip.js";
import { readAddress, view } from "./view.js";
import { startZoom } from "./zoom.js";

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  $("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    redraw();
  });
  system.addEventListener("change", redraw);
}
// sections are reached without touching the address, which keeps the node and the threshold
function startJumps() {
  for (const jump of document.querySelectorAll("[data-jump]")) {
    jump.addEventListener("click", (event) => {
      event.preventDefault();
      const target = $(jump.getAttribute("href").slice(1));
      target.scrollIntoView({ block: "start" });
      target.focus({ preventScroll: true });
    });
  }
}

// a report on modules alone has no sections on how far a smaller graph is from its model
function hideEmpty() {
  const without = [["h-modules", !data.modules], ["h-faith", !data.faithfulness.length], ["h-checks", !Object.keys(data.checks ?? {}).length], ["h-rate", !graphs.length], ["h-worst", !graphs.length || (unit === "image" && !data.worst_tokens.length)]];
  for (const [heading, empty] of without) {
    if (!empty) continue;
    $(heading).closest("section").hidden = true;
    document.querySelector(`nav [href="#${heading}"]`).hidden = true;
  }
  document.querySelector(".skip").setAttribute("href", data.modules ? "#h-modules" : "#h-faith");
}

startTips();
hideEmpty();
startTheme();
startJumps();
startHeader();
startModules();
startFaithfulness();
startProof();
startScatter();
startChecks();
startCurve();
startGraph();
startKernels();
startPanel();
startNodePage();
startZoom();
startEdges();
startWorst();
startProvenance();
readAddress();
window.addEventListener("hashchange", readAddress);
// a permalink to a node opens at the graph, whatever the browser remembers
if (view.node !== null) {
  history.scrollRestoration = "manual";
  $("h-graph").scrollIntoView({ block: "start" });
}
document.documentElement.dataset.ready = "true";
