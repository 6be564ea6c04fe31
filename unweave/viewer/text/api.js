// Questions to the server that this page came from. A newer question takes the place of one not yet answered.
import { known, state } from "./state.js";

async function ask(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is unweave serve still running?");
  }
  const said = await reply.json();
  if (!reply.ok) throw new Error(said.error);
  return said;
}
export const getGraph = () => ask("/api/graph");
export const getTexts = () => ask("/api/texts");

let running = null;
export async function run() {
  running?.abort();
  const mine = (running = new AbortController());
  const question = { text: state.text, ablate: state.ablate, node: state.node, measure: state.measure && state.node !== null };
  if (known.facts.graphs.some((graph) => graph.resample)) question.counterfactual = state.other;
  if (state.only && state.token !== null) question.positions = [state.token];
  try {
    return await ask("/api/run", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(question), signal: mine.signal });
  } finally {
    if (running === mine) running = null;
  }
}
