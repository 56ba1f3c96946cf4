//! Narrows a plan to what was asked for. Pure.

use sealci_core::plan::{ExecutorKind, Plan};

/// Keeps the named actions and all that they need, directly or not, in the plan's order. The error is the name of an
/// action that the plan does not have.
pub fn keep(plan: Plan, names: &[String]) -> Result<Plan, String> {
    if names.is_empty() {
        return Ok(plan);
    }
    let mut kept = vec![false; plan.actions.len()];
    let mut wanted = Vec::new();
    for name in names {
        let found = plan.actions.iter().position(|action| action.name == *name);
        wanted.push(found.ok_or_else(|| name.clone())?);
    }
    while let Some(index) = wanted.pop() {
        if !std::mem::replace(&mut kept[index], true) {
            wanted.extend(&plan.actions[index].needs);
        }
    }
    // An index moves down by as many as were left out before it.
    let moved = |index: usize| kept[..index].iter().filter(|kept| **kept).count();
    let actions = plan.actions.into_iter().enumerate().filter(|(index, _)| kept[*index]);
    let actions = actions.map(|(_, mut action)| {
        // What is used is needed, and so is kept.
        action.needs.iter_mut().chain(&mut action.uses).for_each(|index| *index = moved(*index));
        action
    });
    Ok(Plan { name: plan.name, actions: actions.collect() })
}

/// Has the actions that ask for no executor of their own run by this one.
pub fn run_by(plan: &mut Plan, executor: ExecutorKind) {
    for action in &mut plan.actions {
        if action.environment.required_executor().is_none() {
            action.environment.executor = Some(executor);
        }
    }
}

#[cfg(test)]
mod tests {
    use sealci_core::manifest::{ManifestSource, parse};

    use super::*;

    const MANIFEST: &str = "name: x
actions:
  late: {needs: [far, lint], commands: [true]}
  lint: {needs: [], commands: [true]}
  other: {needs: [], commands: [true]}
  far: {needs: [near], commands: [true], configuration: {executor: process}}
  near: {needs: [], commands: [true]}
";

    fn plan() -> Plan {
        parse(&ManifestSource { name: "x", text: MANIFEST.as_bytes() }).unwrap()
    }

    /// Each action with the names of its needs.
    fn graph(plan: &Plan) -> Vec<(String, Vec<String>)> {
        let name = |index: &usize| plan.actions[*index].name.clone();
        plan.actions.iter().map(|a| (a.name.clone(), a.needs.iter().map(name).collect())).collect()
    }

    #[test]
    fn what_is_used_keeps_its_place() {
        let manifest = "name: x
actions:
  other: {needs: [], commands: [true]}
  made: {needs: [], commands: [true], artifacts: {paths: [x]}}
  user: {needs: [made], uses: [made], commands: [true]}
";
        let plan = parse(&ManifestSource { name: "x", text: manifest.as_bytes() }).unwrap();
        let kept = keep(plan, &["user".to_owned()]).unwrap();
        assert_eq!((kept.actions[1].uses.as_slice(), kept.actions[1].needs.as_slice()), (&[0][..], &[0][..]));
    }

    #[test]
    fn an_action_is_kept_with_what_it_needs() {
        let whole = graph(&plan());
        for names in [&["late"][..], &["far"], &["lint", "near"], &["other", "other"], &[]] {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let kept = graph(&keep(plan(), &names).unwrap());
            for action in &kept {
                assert!(whole.contains(action), "{names:?}: {action:?} is as it was");
                assert!(action.1.iter().all(|need| kept.iter().any(|(name, _)| name == need)), "{names:?}");
            }
            assert!(names.iter().all(|name| kept.iter().any(|(kept, _)| kept == name)), "{names:?}");
        }
        let kept = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            keep(plan(), &names).map(|plan| plan.actions.len())
        };
        assert_eq!((kept(&["late"]), kept(&["far"]), kept(&[])), (Ok(4), Ok(2), Ok(5)));
        assert_eq!(kept(&["lint", "nope"]), Err("nope".to_owned()));
    }

    #[test]
    fn an_executor_is_for_those_that_ask_for_none() {
        let mut plan = plan();
        run_by(&mut plan, ExecutorKind::Sandbox);
        let executors: Vec<_> = plan.actions.iter().map(|action| action.environment.executor).collect();
        assert_eq!(executors[0], Some(ExecutorKind::Sandbox));
        assert_eq!(executors[3], Some(ExecutorKind::Process));
    }
}
