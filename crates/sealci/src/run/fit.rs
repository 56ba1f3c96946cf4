//! Refuses what can never run here: no other agent will ever come. Pure.

use std::collections::BTreeMap;

use sealci_core::plan::{ExecutorKind, Plan, PlannedAction, Resources};

use crate::exit::Failure;
use crate::format;

/// Refuses a plan that asks for an executor which is not there.
pub fn check_executors(plan: &Plan, is_offered: impl Fn(ExecutorKind) -> bool) -> Result<(), Failure> {
    for action in &plan.actions {
        let Some(kind) = action.environment.required_executor() else { continue };
        if is_offered(kind) {
            continue;
        }
        let failure = Failure::usage(format!(
            "the action `{}` is to run in the executor `{}`, which there is none of here",
            action.name,
            kind.as_str()
        ));
        return Err(match kind {
            ExecutorKind::Process => failure.help("say --allow-process; it isolates nothing"),
            ExecutorKind::Sandbox => failure.help("`sealci doctor` says what is missing for it"),
            ExecutorKind::Microvm => failure.help("say --microvms, where /dev/kvm runs machines"),
            _ => failure.help("leave it out with --action, or change its `configuration`"),
        });
    }
    Ok(())
}

/// Refuses a plan that asks for more than the machine has, or for labels that it has not.
pub fn check_machine(
    plan: &Plan,
    capacity: Resources,
    labels: &BTreeMap<String, String>,
) -> Result<(), Failure> {
    match plan.actions.iter().find_map(|action| Some((action, lacking(action, capacity, labels)?))) {
        None => Ok(()),
        Some((action, lacking)) => {
            Err(Failure::usage(format!("the action `{}` can never run here: {lacking}", action.name))
                .help("leave it out with --action, or change its `configuration`"))
        }
    }
}

/// What the machine lacks for an action.
fn lacking(action: &PlannedAction, capacity: Resources, labels: &BTreeMap<String, String>) -> Option<String> {
    let wanted = &action.environment;
    let (need, signed) = (wanted.resources, |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX));
    if need.memory_bytes > capacity.memory_bytes {
        let [need, has] =
            [need.memory_bytes, capacity.memory_bytes].map(|amount| format::bytes(signed(amount)));
        return Some(format!("it needs {need} of memory, and this machine has {has} for actions"));
    }
    if need.cpu_millis > capacity.cpu_millis {
        let [need, has] = [need.cpu_millis, capacity.cpu_millis].map(|amount| format::cpus(signed(amount)));
        return Some(format!("it needs {need} CPUs, and this machine has {has}"));
    }
    let (name, value) = wanted.labels.iter().find(|(name, value)| labels.get(*name) != Some(*value))?;
    Some(match labels.get(name) {
        Some(other) => format!("it needs the label {name}={value}, and here it is {name}={other}"),
        None => format!("it needs the label {name}={value}, which this machine has not"),
    })
}

#[cfg(test)]
mod tests {
    use sealci_core::manifest::{ManifestSource, parse};

    use super::*;

    /// What is said of an action with this configuration on a machine with 2 CPUs and 4 GiB.
    fn refused(configuration: &str) -> Option<String> {
        let text = format!("name: x\nactions:\n  a: {{configuration: {{{configuration}}}, commands: [x]}}\n");
        let plan = parse(&ManifestSource { name: "x", text: text.as_bytes() }).unwrap();
        let capacity = Resources { cpu_millis: 2000, memory_bytes: 4 << 30 };
        let labels = BTreeMap::from([("arch".to_owned(), "x86_64".to_owned())]);
        check_machine(&plan, capacity, &labels).err().map(|failure| failure.message)
    }

    #[test]
    fn what_is_lacking_is_named() {
        assert_eq!(refused("resources: {cpu: 2, memory: 4GiB}, labels: {arch: x86_64}"), None);
        for (configuration, lacking) in [
            (
                "resources: {memory: 16TiB}",
                "it needs 16 TiB of memory, and this machine has 4 GiB for actions",
            ),
            ("resources: {cpu: 2.5}", "it needs 2.5 CPUs, and this machine has 2"),
            ("labels: {gpu: \"true\"}", "it needs the label gpu=true, which this machine has not"),
            ("labels: {arch: riscv64}", "it needs the label arch=riscv64, and here it is arch=x86_64"),
        ] {
            let message = refused(configuration).unwrap_or_default();
            assert_eq!(message, format!("the action `a` can never run here: {lacking}"));
        }
    }
}
