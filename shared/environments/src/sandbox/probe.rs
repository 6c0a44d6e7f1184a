//! Which layers work on this host: each is tried for itself, the way it is used.

use std::time::Duration;

use grail_process::cgroup::Delegation;
use grail_process::{ChildSpec, Environment, Grouping, LogPolicy};
use serde::Serialize;

use super::enter::OUTER;
use super::layers::{Layer, LayerSet};
use super::plan::{Helper, Plan, View};
use super::tool;

/// How long entering one layer may take.
const TRY_LIMIT: Duration = Duration::from_secs(30);

/// What was found of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerReport {
    /// Which layer.
    pub layer: Layer,
    /// Why it does not work here; `None` if it does.
    pub refusal: Option<String>,
}

/// Tries every layer in a throwaway process.
#[must_use]
pub async fn probe(helper: &Helper, view: &View, delegation: Option<&Delegation>) -> Vec<LayerReport> {
    let mut reports = Vec::new();
    for layer in Layer::ALL {
        let refusal = match layer {
            Layer::Cgroup => cgroup(delegation),
            // Limits are lowered, which no kernel refuses.
            Layer::Limits => None,
            _ => attempt(helper, view, layer).await,
        };
        reports.push(LayerReport { layer, refusal });
    }
    reports
}

/// The layers that work.
#[must_use]
pub(crate) fn working(reports: &[LayerReport]) -> LayerSet {
    reports.iter().filter(|report| report.refusal.is_none()).map(|report| report.layer).collect()
}

fn cgroup(delegation: Option<&Delegation>) -> Option<String> {
    let Some(delegation) = delegation else { return Some("no control group was delegated to this process".to_owned()) };
    let leaf = match delegation.leaf("probe") {
        Ok(leaf) => leaf,
        Err(error) => return Some(format!("make a control group: {error}")),
    };
    let has_limits = ["memory.max", "pids.max"].iter().any(|limit| leaf.folder().join(limit).exists());
    (!has_limits).then(|| "our control group has neither the memory nor the pids controller".to_owned())
}

async fn attempt(helper: &Helper, view: &View, layer: Layer) -> Option<String> {
    let layers = LayerSet::NONE.with(layer);
    let plan = Plan { view: view.clone(), layers, only_try: true, nice: 0 };
    match tool::finish(spec("sandbox-probe", helper, &plan), TRY_LIMIT).await {
        Ok(finished) if finished.is_done() => None,
        Ok(finished) => Some(finished.trouble()),
        Err(error) => Some(grail_process::with_causes(&error)),
    }
}

/// The helper with `plan`, quiet, without any variable.
pub(crate) fn spec(name: &str, helper: &Helper, plan: &Plan) -> ChildSpec {
    // A plan is paths and names of layers: there is nothing in it that cannot be written.
    let text = serde_json::to_string(plan).unwrap_or_default();
    let mut spec = ChildSpec::new(name, &helper.program).arguments(&helper.arguments).arguments([OUTER, text.as_str()]);
    spec.environment = Environment::empty();
    // With a session of its own, nothing that it starts can get out of sight.
    spec.grouping = Grouping::Session;
    spec.log = LogPolicy::to_sink(|_| {});
    spec
}
