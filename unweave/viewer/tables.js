// Faithfulness, the strongest edges, the worst tokens, and where it all comes from.
import { data, graphs, heaviest, nats, nodeName, ofEdges, portColour, unit, weight } from "./data.js";
import { $, bar, chip, el, running, token } from "./dom.js";
import { count, known, large, num, percent, plain } from "./format.js";
import { hasKernels, kernelColumn } from "./kernels.js";
import { makeTable } from "./table.js";
import { change, onChange } from "./view.js";

const SHOWN = 200;

// the unit once, not twice
const range = (low, high, format) => `${format(low).replace(/%$/, format === percent ? "" : "%")}${low < 0 || high < 0 ? " to " : "–"}${format(high)}`;
export function interval(x, format = num) {
  const certain = !x || !known(x.low) || !known(x.high) || x.low === x.high;
  return [format(x?.value), certain ? null : el("span", { class: "ci" }, range(x.low, x.high, format))];
}
const mean = (name, key, help, format) => ({ name, help, value: (row) => row[key]?.value, show: (row) => interval(row[key], format) });
const single = (name, key, help, format = num) => ({ name, help, value: (row) => row[key], show: (row) => format(row[key]) });

export function startFaithfulness() {
  const place = (name) => plain(name);
  const columns = [
    { name: "graph", text: true, head: true, help: "The graph, the model itself, and other ways to make the model smaller", value: (row) => place(row.name), show: (row) => place(row.name) },
    single("size", "size", ofEdges ? "Share of the model’s edges that is kept" : "Share of the numbers in the model’s channels that is stored", percent),
    mean("KL, nats", "kl_nats", "Divergence of the output from the model’s: mean over held-out tokens, in nats per token".replaceAll("token", unit)),
    single("99%", "kl_p99", "The divergence that 1 token in 100 exceeds, in nats"),
    single("99.9%", "kl_p999", "The divergence that 1 token in 1,000 exceeds, in nats"),
    single("max", "kl_max", "The largest divergence of any held-out token, in nats"),
    mean("same first guess", "top1_agreement", `How often it puts the same ${unit === "token" ? "token" : "output"} first as the model does`, percent),
    mean("loss, nats", "loss_nats", "Its own next-token loss on the held-out text, in nats per token"),
    mean("loss recovered", "loss_recovered", "100% is the model’s loss, 0% the loss with every channel at its mean", percent),
    single("FLOP/token", "flops_per_token", "Floating-point operations per token", large),
    single("bits", "size_bits", "Bits to store it", large),
  ].filter((column) => column.head || data.faithfulness.some((row) => known(column.value(row))));
  makeTable($("faith"), "How far each graph and baseline is from the model", columns, {
    rowClass: (row) => (graphs.includes(row) ? "ours" : null),
  })(data.faithfulness);
}

export function startProof() {
  if (!data.proof?.length) return;
  $("proof-section").hidden = false;
  makeTable($("proof"), "What the circuit has to show", [
    { name: "what", text: true, head: true, value: (row) => row.what, show: (row) => plain(row.what) },
    { name: "value", value: (row) => row.value, show: (row) => interval(row) },
  ])(data.proof);
}

const goTo = (i) => {
  change({ node: i });
  document.getElementById("h-graph").scrollIntoView({ block: "start" });
};
const nodeButton = (i) => el("button", { type: "button", class: "link", onclick: () => goTo(i) }, nodeName(i));

export function startEdges() {
  // the whole list, cut edges too: the table says which are kept
  const edges = [...data.edges], sort = () => edges.sort((a, b) => weight(b) - weight(a));
  sort();
  const names = new Map(edges.map((edge) => [edge, `${data.nodes[edge.src].name} ${data.nodes[edge.dst].name} .${edge.port}`.toLowerCase()]));
  const columns = [
    { name: "from", text: true, value: (e) => data.nodes[e.src].name, show: (e) => nodeButton(e.src) },
    { name: "to", text: true, value: (e) => data.nodes[e.dst].name, show: (e) => nodeButton(e.dst) },
    { name: "port", text: true, help: "What of the later node hears it: query, key, value, or the one input", value: (e) => e.port, show: (e) => chip(e.port, portColour(e.port)) },
    { name: `nats/${unit}`, help: "What the output would lose if the later node heard only the mean of the earlier one", value: (e) => nats(e), show: (e) => bar(weight(e) / heaviest, num(nats(e))) },
    { name: "± s.e.", help: "Standard error", value: (e) => e.se, show: (e) => num(e.se, 2) },
    { name: "how", text: true, help: "Measured: the edge was ablated and the divergence taken. Estimated: second order, from gradients", value: (e) => String(!e.measured), show: (e) => el("span", { class: e.measured ? "" : "dim" }, e.measured ? "measured" : "estimated") },
  ];
  if (hasKernels) columns.splice(2, 0, kernelColumn);
  if (edges.some((e) => e.kept === false)) columns.push({ name: "kept", text: true, value: (e) => String(e.kept === false), show: (e) => (e.kept === false ? "cut" : "kept") });
  const fill = makeTable($("edge-table"), "The strongest edges", columns, { empty: "No edge has that in its name.", rowClass: (e) => (e.kept === false ? "cut" : null) });
  const filter = () => {
    const words = $("edge-filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = words.length ? edges.filter((edge) => words.every((word) => names.get(edge).includes(word))) : edges;
    fill(found.slice(0, SHOWN));
    $("edge-count").textContent = found.length > SHOWN ? `the strongest ${SHOWN} of ${count(found.length)}` : `${count(found.length)} ${found.length === 1 ? "edge" : "edges"}`;
  };
  $("edge-filter").addEventListener("input", filter);
  onChange((part) => {
    if (!("kind" in part)) return;
    sort();
    filter();
  });
  filter();
}

export function startWorst() {
  const most = Math.max(0, ...data.worst_tokens.map((row) => row.kl_nats ?? 0));
  makeTable($("worst"), "Held-out tokens where graph and model differ most", [
    { name: "KL, nats", value: (r) => r.kl_nats, show: (r) => bar(r.kl_nats / most, num(r.kl_nats)) },
    { name: "text up to the token", value: (r) => r.context, show: (r) => el("span", { class: "passage" }, el("span", { class: "before" }, running([...r.context].slice(-90).join(""))), token(r.token)) },
    { name: "model says", text: true, value: (r) => r.model_prediction, show: (r) => token(r.model_prediction) },
    { name: "graph says", text: true, value: (r) => r.graph_prediction, show: (r) => token(r.graph_prediction) },
  ], { empty: "No token was recorded." })(data.worst_tokens);
}

export function startProvenance() {
  const shown = (value) => plain(typeof value === "object" && value !== null ? JSON.stringify(value) : String(value ?? "n/a"));
  const entries = Object.entries({ ...data.provenance, "report format": `${data.format} ${data.version}` });
  $("provenance").replaceChildren(...entries.flatMap(([key, value]) => [el("dt", {}, plain(key).replaceAll("_", " ")), el("dd", {}, shown(value))]));
}
