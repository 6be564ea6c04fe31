// The first lines: what was made, how small it is and how far from the model, in words and in five figures.
import { data, graphs, ofEdges, ours, unit } from "./data.js";
import { $, el } from "./dom.js";
import { count, known, large, num, percent, plain, share } from "./format.js";
import { verdict } from "./modules.js";

// the baselines that store about as much as the graph does
function rival() {
  const rows = data.faithfulness.filter((row) => row.baseline && known(row.kl_nats.value) && known(row.size) && known(ours.size));
  const near = rows.filter((row) => Math.abs(row.size - ours.size) <= 0.1 * ours.size);
  return near.reduce((best, row) => (best && best.kl_nats.value <= row.kl_nats.value ? best : row), null);
}
function summary() {
  if (!ours) return verdict();
  const strong = (text) => el("strong", {}, text);
  const { kl_nats: kl, top1_agreement: top1 } = ours;
  const parts = known(ours.size)
    ? [ofEdges ? "A circuit of " : "A graph with ", strong(share(ours.size)), ofEdges ? " of the edges of " : " of the numbers in the channels of ", plain(data.model.name)]
    : ["A graph of ", plain(data.model.name)];
  parts.push(" whose output is ", strong(`${num(kl.value)} nats per ${unit}`), " from the model’s on held-out data");
  if (known(kl.low) && known(kl.high)) parts.push(` (95% interval ${num(kl.low)} to ${num(kl.high)})`);
  if (known(top1.value)) parts.push(", and whose first guess is the same ", strong(`${percent(top1.value)} of the time`));
  const best = rival();
  if (best) parts.push(`; the best baseline of about that size, ${plain(best.name)}, is ${num(best.kl_nats.value)} nats away`);
  return [...parts, "."];
}
function figure(name, value, unit, help) {
  return el("div", { "data-tip": help, tabindex: "0" }, el("dt", {}, name), el("dd", {}, value, unit && el("span", { class: "unit" }, unit)));
}
function moduleFigures() {
  const { hierarchy, chosen, measured, tests, effects } = data.modules, blocks = (k) => count(new Set(hierarchy[k].labels).size);
  const p = tests.filter((test) => test.statistic === "saved_bits").map((test) => test.p);
  return [
    figure("nodes", count(data.nodes.length), "", "How many nodes there are to group"),
    figure("blocks chosen", blocks(chosen), "", "The partition that describes the communication in the fewest bits; 1 is no grouping at all"),
    figure("p", num(p.length ? Math.max(...p) : null, 2), "against nulls", "How likely networks without modules save as many bits"),
    measured === null ? null : figure("blocks measured", blocks(measured), "", "The partition whose interfaces and effects were measured"),
    effects.length ? figure("largest effect", num(Math.max(...effects.map((row) => row.nats.value ?? 0))), "nats/token", "What the output loses when the most important block, or pair, says only its mean") : null,
  ].filter(Boolean);
}
function figures() {
  if (!ours) return moduleFigures();
  const original = data.faithfulness.find((row) => row.name === "original");
  const cost = original && known(ours.flops_per_token) && original.flops_per_token > 0 ? ours.flops_per_token / original.flops_per_token : null;
  return [
    figure("size", share(ours.size), ofEdges ? "of the edges" : "", ofEdges ? "Share of the model’s edges that the circuit keeps" : "Share of the numbers in the model’s channels (heads and MLPs) that the graph stores"),
    figure("divergence", num(ours.kl_nats.value), `nats/${unit}`, `Mean divergence of the graph’s output from the model’s, on held-out ${unit}s`),
    figure("same first guess", percent(ours.top1_agreement.value), "", `How often graph and model put the same ${unit === "token" ? "token" : "output"} first`),
    ofEdges ? null : figure("loss recovered", percent(ours.loss_recovered?.value), "", "100% is the model’s loss, 0% the loss with every channel at its mean"),
    ofEdges ? null : figure("arithmetic", percent(cost, 0), "of the model’s", "Floating-point operations per token, against the model’s"),
  ].filter(Boolean);
}
function description() {
  const { model, scope } = data;
  const parts = [plain(model.family), `${count(model.n_layers)} layers`];
  // maps have neither
  if (unit === "token") parts.push(`${count(model.n_heads)} heads`, `width ${count(model.d_model)}`);
  if (known(model.d_vocab)) parts.push(`${count(model.d_vocab)} tokens`);
  parts.push(`${large(model.n_parameters)} parameters`);
  if (ours) $("faith-note").textContent = `Scope: ${plain(scope.description)}; distance: ${plain(scope.divergence).toUpperCase()}. Measured on ${count(scope.n_tokens_held_out)} held-out ${unit}s,`
    + ` calibrated on ${count(scope.n_tokens_calibration)} others. ${graphs.length > 1 ? "The graphs are" : "The graph is"} marked; small figures are 95% intervals.`;
  return parts.join(" · ");
}
export function startHeader() {
  document.title = `${plain(data.title)} · unweave`;
  $("title").textContent = plain(data.title);
  $("title").before(el("p", { class: "about" }, description()));
  $("summary").replaceChildren(...summary());
  $("facts").replaceChildren(...figures());
}
