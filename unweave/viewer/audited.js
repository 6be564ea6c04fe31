// The audit: ranked tokens and texts, clusters of them, the channels that carry the disagreement, and the alarm.
import { el, bar, running, token } from "./dom.js";
import { count, num, percent, plain } from "./format.js";
import { makeTable } from "./table.js";

const LISTED = 40;

export function auditPart(facts) {
  const word = (i) => facts.words[String(i)] ?? `[${i}]`;
  const moved = (pairs) => pairs.slice(0, 4).map(([i, change]) => token(word(i), `${num(change)} of probability`));
  const most = Math.max(0, ...facts.tokens.map((row) => row.nats ?? 0));
  const tables = Object.fromEntries(["tokens", "texts", "clusters", "writers", "readers"].map((name) => [name, el("div", { class: "scroll tall", id: `audit-${name}` })]));
  makeTable(tables.tokens, "The tokens where graph and model differ most", [
    { name: "nats", value: (r) => r.nats, show: (r) => bar(r.nats / most, num(r.nats)) },
    { name: "cluster", value: (r) => r.cluster, show: (r) => count(r.cluster) },
    { name: "text up to the token", value: (r) => r.sequence, show: (r) => el("span", { class: "passage" }, el("span", { class: "before" }, running(r.context.slice(0, -1).map(word).join(""))), token(r.context.length ? word(r.context.at(-1)) : "")) },
    { name: "model says", text: true, value: (r) => word(r.model_says), show: (r) => token(word(r.model_says)) },
    { name: "graph says", text: true, value: (r) => word(r.graph_says), show: (r) => token(word(r.graph_says)) },
    { name: "sequence", value: (r) => r.sequence, show: (r) => `${count(r.sequence)}:${count(r.position)}` },
  ], { empty: "Graph and model do not differ." })(facts.tokens.slice(0, LISTED));
  makeTable(tables.texts, "Texts by their worst token", [
    { name: "sequence", value: (r) => r.sequence, show: (r) => count(r.sequence) },
    { name: "worst token, nats", value: (r) => r.nats, show: (r) => num(r.nats) },
    { name: "at position", value: (r) => r.position, show: (r) => count(r.position) },
    { name: "mean, nats", value: (r) => r.mean_nats, show: (r) => num(r.mean_nats) },
  ])(facts.texts.slice(0, LISTED));
  makeTable(tables.clusters, "Tokens at which the outputs differ alike", [
    { name: "nats per token", value: (r) => r.mean_nats, show: (r) => num(r.mean_nats) },
    { name: "tokens", value: (r) => r.n_tokens, show: (r) => count(r.n_tokens) },
    { name: "model says more", text: true, value: (r) => r.raised.length, show: (r) => moved(r.raised) },
    { name: "model says less", text: true, value: (r) => r.lowered.length, show: (r) => moved(r.lowered) },
    { name: "contexts share", text: true, help: "What most often stands so many places back, in at least half of the contexts", value: (r) => r.shared.length, show: (r) => (r.n_tokens < 2 ? "" : r.shared.filter(([, , share]) => share >= 0.5).slice(0, 4).map(([back, i, share]) => token(word(i), `${count(back)} back in ${percent(share, 0)} of the contexts`))) },
  ])(facts.clusters.slice(0, LISTED));
  for (const [name, what] of [["writers", "writes"], ["readers", "hears"]]) {
    const top = Math.max(0, ...facts[name].map((row) => row.restored_nats ?? 0));
    makeTable(tables[name], `Parts by what is restored when each ${what} what it does in the model`, [
      { name: `restored when it ${what} as in the model`, text: true, head: true, value: (r) => r.name, show: (r) => plain(r.name) },
      { name: "nats restored", help: "At the worst tokens, per token", value: (r) => r.restored_nats, show: (r) => bar(r.restored_nats / top, num(r.restored_nats)) },
      { name: "nats left", value: (r) => r.left_nats, show: (r) => num(r.left_nats) },
    ])(facts[name].slice(0, LISTED));
  }
  const searches = (facts.triggers ?? []).map((found) => {
    const place = el("div", { class: "scroll tall", id: `audit-triggers-${found.at}` });
    makeTable(place, `Runs of tokens put ${found.at === "start" ? "at the start" : "anywhere"}: ${count(found.n_screened)} of ${count(found.n_runs)} tried`, [
      { name: "run", text: true, value: (r) => r.tokens.map(word).join(" "), show: (r) => r.tokens.map((i) => token(word(i))) },
      { name: "nats per text", help: "Beyond what its tokens add one by one, on texts of its own", value: (r) => r.excess_nats, show: (r) => `${num(r.excess_nats)} (${num(r.excess_nats_low)} to ${num(r.excess_nats_high)})` },
      { name: "p", help: "How likely one of all runs does as much where none is a trigger", value: (r) => r.p, show: (r) => num(r.p) },
    ])(found.runs);
    return [el("h4", {}, found.at === "start" ? "Triggers at the start" : "Triggers anywhere"), place];
  });
  const alarm = facts.anomaly, alarms = alarm ? ` The alarm is set at ${num(alarm.threshold)} nats at one token: calibrated on ${count(alarm.n_clean)} clean texts, it is raised by a new text like them with probability at most ${percent(alarm.false_alarms)}. Of the ${count(alarm.n_texts)} texts audited, ${count(alarm.alarms)} raise it.` : "";
  return [
    el("p", { class: "verdict" }, `${num(facts.kl_nats)} nats per token over ${count(facts.n_tokens)} tokens; the worst of them ${num(most)}.${alarms}`),
    el("h4", {}, "Worst tokens"), tables.tokens, el("h4", {}, "Clusters"), tables.clusters, el("h4", {}, "What carries it"), tables.writers, tables.readers, el("h4", {}, "Texts"), tables.texts,
    ...searches.flat(),
  ];
}
