//! Builds the variables that every action sees, from what it is. Pure.

use std::collections::BTreeMap;

use sealci_core::event::RefName;
use sealci_core::repository::redacted;
use sealci_proto::agent::ActionSpec;

/// The manifest's variables and ours; ours win. What depends on where the action runs (`SEALCI_ATTEMPT`,
/// `SEALCI_WORKSPACE`, and `HOME`, `PATH`, `TMPDIR` where the manifest names none) is the executor's to add.
///
/// All of them are always there; an event without a branch has an empty `SEALCI_BRANCH`, so `set -u` is no trap.
pub fn variables(spec: &ActionSpec) -> BTreeMap<String, String> {
    let source = spec.source.clone().unwrap_or_default();
    let name: Option<RefName> = source.r#ref.parse().ok();
    let short = |part: Option<&str>| part.unwrap_or_default().to_owned();
    let ours = [
        ("CI", "true".to_owned()),
        ("SEALCI", "true".to_owned()),
        ("SEALCI_PIPELINE_ID", spec.pipeline_id.clone()),
        ("SEALCI_ACTION", spec.action_name.clone()),
        ("SEALCI_EVENT", source.event_kind),
        ("SEALCI_BRANCH", short(name.as_ref().and_then(RefName::branch))),
        ("SEALCI_TAG", short(name.as_ref().and_then(RefName::tag))),
        ("SEALCI_REF", source.r#ref),
        ("SEALCI_REVISION", source.revision),
        ("SEALCI_REPOSITORY", redacted(&source.repository_url)),
    ];
    let mut variables: BTreeMap<_, _> = spec.env.clone().into_iter().collect();
    variables.extend(ours.map(|(name, value)| (name.to_owned(), value)));
    variables
}

#[cfg(test)]
mod tests {
    use super::*;
    use sealci_proto::agent::Source;

    fn spec(r#ref: &str) -> ActionSpec {
        ActionSpec {
            pipeline_id: "p".into(),
            action_name: "test".into(),
            env: [("A".to_owned(), "1".to_owned()), ("CI".to_owned(), "no".to_owned())].into(),
            source: Some(Source {
                repository_url: "https://git:hunter2@forge.example.org/o/r".into(),
                r#ref: r#ref.into(),
                revision: "a".repeat(40),
                event_kind: "push".into(),
                ..Source::default()
            }),
            ..ActionSpec::default()
        }
    }

    #[test]
    fn ours_win_and_the_manifests_stay() {
        let variables = variables(&spec("refs/heads/release/1.x"));
        for (name, value) in [
            ("A", "1"),
            ("CI", "true"),
            ("SEALCI", "true"),
            ("SEALCI_PIPELINE_ID", "p"),
            ("SEALCI_ACTION", "test"),
            ("SEALCI_EVENT", "push"),
            ("SEALCI_REF", "refs/heads/release/1.x"),
            ("SEALCI_BRANCH", "release/1.x"),
            ("SEALCI_TAG", ""),
            ("SEALCI_REPOSITORY", "https://forge.example.org/o/r"),
        ] {
            assert_eq!(variables[name], value, "{name}");
        }
    }

    #[test]
    fn a_tag_is_no_branch() {
        let variables = variables(&spec("refs/tags/v1"));
        assert_eq!((variables["SEALCI_BRANCH"].as_str(), variables["SEALCI_TAG"].as_str()), ("", "v1"));
    }
}
