//! What holds for every manifest: written plans are read back, bytes never bring the reader down, errors lie inside the
//! text, and plans can always be run to their end.

#![allow(clippy::unwrap_used)] // also in what tests share

mod sound;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use proptest::prelude::*;
use proptest::sample::Index;
use sealci_core::manifest::ManifestErrorKind;
use sound::{assert_errors_lie_inside, assert_sound, can_be_run, read};

/// An action to be written; needs are indices of earlier or later actions, none is the order's.
#[derive(Debug, Clone)]
struct Written {
    name: String,
    needs: Option<Vec<usize>>,
    commands: Vec<String>,
    env: BTreeMap<String, String>,
    timeout_s: u32,
}

/// A text in double quotes, escaped as YAML wants it.
fn in_quotes(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() || c == '\u{FEFF}' => write!(quoted, "\\U{:08X}", u32::from(c)).unwrap(),
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

fn any_text() -> impl Strategy<Value = String> {
    let odd = prop::sample::select(vec![
        "no",
        "~",
        "0123",
        "1.10",
        "",
        "- x",
        "a: b",
        "# c",
        "&a",
        "*a",
        "!t",
        "{",
        "\t",
        "é\u{202e}",
        "'",
        "\\",
        "\r\n",
    ]);
    prop_oneof![odd.prop_map(str::to_owned), "\\PC{0,12}", "[ -~\\n]{0,20}"]
        .prop_filter("no expressions", |text| !text.contains("${{"))
}

fn any_actions() -> impl Strategy<Value = Vec<Written>> {
    let name = "[A-Za-z0-9_(][A-Za-z0-9 _(),-]{0,9}[A-Za-z0-9_)]";
    let needs = prop::option::of(prop::collection::vec(any::<Index>(), 0..4));
    let commands = prop::collection::vec(any_text().prop_filter("not blank", |t| !t.trim().is_empty()), 1..4);
    let env = prop::collection::btree_map("[A-BD-RT-Z_][A-Z0-9_]{0,5}", any_text(), 0..3);
    let action = (name, needs, commands, env, 1..604_800_u32);
    prop::collection::vec(action, 1..12).prop_map(|actions| {
        let count = actions.len();
        let written = |(index, (name, needs, commands, env, timeout_s)): (
            usize,
            (String, Option<Vec<Index>>, _, _, _),
        )| {
            let needs = needs.map(|needs| {
                let mut needs: Vec<usize> = needs.iter().map(|need| need.index(count)).collect();
                needs.sort_unstable();
                needs.dedup();
                needs
            });
            Written { name: format!("{index} {name}"), needs, commands, env, timeout_s }
        };
        actions.into_iter().enumerate().map(written).collect()
    })
}

fn write_manifest(actions: &[Written], flow: bool) -> String {
    let mut text = "name: written\nactions:\n".to_owned();
    for action in actions {
        let needs = action
            .needs
            .as_ref()
            .map(|needs| needs.iter().map(|need| in_quotes(&actions[*need].name)).collect::<Vec<_>>());
        let commands: Vec<String> = action.commands.iter().map(|command| in_quotes(command)).collect();
        let env: Vec<String> =
            action.env.iter().map(|(name, value)| format!("{name}: {}", in_quotes(value))).collect();
        if flow {
            let needs = needs.map(|needs| format!("needs: [{}], ", needs.join(", "))).unwrap_or_default();
            writeln!(
                text,
                "  {}: {{{needs}commands: [{}], env: {{{}}}, timeout: {}s}}",
                in_quotes(&action.name),
                commands.join(", "),
                env.join(", "),
                action.timeout_s
            )
            .unwrap();
            continue;
        }
        writeln!(text, "  {}:\n    timeout: {}s\n    commands:", action.name, action.timeout_s).unwrap();
        commands.iter().for_each(|command| writeln!(text, "      - {command}").unwrap());
        if !env.is_empty() {
            writeln!(text, "    env:\n      {}", env.join("\n      ")).unwrap();
        }
        match needs.as_deref() {
            None => {}
            Some([]) => text.push_str("    needs: []\n"),
            Some(needs) => writeln!(text, "    needs:\n    - {}", needs.join("\n    - ")).unwrap(),
        }
    }
    text
}

/// The needs as the rules say them, self-needs included.
fn expected_needs(actions: &[Written]) -> Vec<Vec<usize>> {
    let needs = |(index, action): (usize, &Written)| match &action.needs {
        Some(needs) => needs.clone(),
        None => index.checked_sub(1).into_iter().collect(),
    };
    actions.iter().enumerate().map(needs).collect()
}

const EVERYTHING: &str = r#"# everything that is offered, in every style
name: everything
env: {RUST_BACKTRACE: "1", LEVEL: 'it''s'}
actions:
  build:
    configuration:
      container: {image: "rust:1.90"}
      labels: {arch: x86_64}
      resources: {cpu: 500m, memory: 1.5GiB}
      network: off
    commands:
      - cargo test
      - echo "so: be it"
      - |
        for i in 1 2; do
          echo é $i
        done
    timeout: 1h30m
  test:
    needs: [build]
    shell: bash
    env:
      FOLDED: >-
        one
        line
    commands: [cargo test, "x\ty"]
    allow-failure: [1, 77]
"#;

/// A change to bytes: what stands at a place is replaced by something else.
fn any_change() -> impl Strategy<Value = (Index, usize, Vec<u8>)> {
    let tokens = prop::sample::select(vec![
        "\n", "\r", "\t", " ", "  ", ":", ": ", "- ", "[", "]", "{", "}", ",", "\"", "'", "|", ">", "&a ",
        "*a", "!", "!!str ", "#", " #", "%", "@", "?", "---", "...", "\u{FEFF}", "\u{85}", "\u{2028}", "é",
        "${{", "<<: ", "~", "needs", "null",
    ]);
    let inserted = prop_oneof![
        4 => tokens.prop_map(|token| token.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..4),
    ];
    (any::<Index>(), prop_oneof![Just(0_usize), 0..3_usize, 0..40_usize], inserted)
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(actions in any_actions(), flow in any::<bool>()) {
        let text = write_manifest(&actions, flow);
        let needs = expected_needs(&actions);
        match read(text.as_bytes()) {
            Ok(plan) => {
                prop_assert!(can_be_run(&needs), "accepted a cycle:\n{text}");
                prop_assert_eq!(plan.actions.len(), actions.len());
                for ((planned, written), needs) in plan.actions.iter().zip(&actions).zip(needs) {
                    prop_assert_eq!(&planned.name, &written.name);
                    prop_assert_eq!(&planned.needs, &needs);
                    prop_assert_eq!(&planned.commands, &written.commands);
                    prop_assert_eq!(&planned.env, &written.env);
                    prop_assert_eq!(planned.timeout.as_secs(), u64::from(written.timeout_s));
                }
            }
            Err(errors) => {
                prop_assert!(!can_be_run(&needs), "{errors}\n{text}");
                let only_cycles = errors.errors().iter().all(|error| error.kind == ManifestErrorKind::Cycle);
                prop_assert!(only_cycles, "{errors}\n{text}");
                assert_errors_lie_inside(&errors);
            }
        }
    }

    #[test]
    fn changed_manifests_are_read_or_refused(changes in prop::collection::vec(any_change(), 1..6)) {
        let mut bytes = EVERYTHING.as_bytes().to_vec();
        for (place, removed, inserted) in changes {
            let start = place.index(bytes.len() + 1);
            let end = (start + removed).min(bytes.len());
            bytes.splice(start..end, inserted);
        }
        assert_sound(&bytes);
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        assert_sound(&bytes);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "(name|actions|a|[ \\n:\\-\\[\\]{},'\"|>#&*!?%@`~é\\r\\t]|\\PC){0,40}") {
        assert_sound(text.as_bytes());
    }
}

#[test]
fn what_is_changed_is_valid_before() {
    assert_eq!(read(EVERYTHING.as_bytes()).unwrap().actions.len(), 2);
}
