//! What attackers write: everything is refused for the right reason, and cheaply. The time and memory of each case are
//! printed by `cargo test -p sealci-core --test manifest_hostile -- --nocapture`, and judged by nobody here: a test
//! that measures a busy machine fails for the wrong reason.

#![allow(clippy::unwrap_used)] // also in what tests share

use std::fmt::Write as _;
use std::time::Instant;

use sealci_core::manifest::{MAX_MANIFEST_BYTES, ManifestErrorKind as Kind, ManifestSource, parse};

/// The kinds of the errors, each once, after checks that hold for every refusal.
fn refused(what: &str, text: impl AsRef<[u8]>) -> Vec<Kind> {
    let text = text.as_ref();
    let begin = Instant::now();
    let errors = match parse(&ManifestSource { name: "ci.yaml", text }) {
        Ok(_) => panic!("{what}: accepted"),
        Err(errors) => errors,
    };
    let parsed = begin.elapsed();
    let rendered = errors.to_string();
    let views = serde_json::to_string(&errors.views()).unwrap();
    println!("{what}: {} bytes, {:?}, with renderings {:?}", text.len(), parsed, begin.elapsed());
    assert!(errors.errors().len() <= 200, "{what}");
    assert!(rendered.len() < 1 << 20 && views.len() < 1 << 20, "{what}: {} bytes", rendered.len());
    let mut kinds: Vec<Kind> = errors.errors().iter().map(|error| error.kind).collect();
    kinds.sort();
    kinds.dedup();
    kinds
}

/// Repeats as often as a manifest has room for.
fn filled(start: &str, unit: &str, end: &str) -> String {
    let times = (MAX_MANIFEST_BYTES - start.len() - end.len()) / unit.len();
    format!("{start}{}{end}", unit.repeat(times))
}

#[test]
fn bombs_of_aliases() {
    let mut laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for (this, before) in ('b'..='z').zip('a'..='y') {
        let alias = format!("*{before}");
        writeln!(laughs, "{this}: &{this} [{}]", [alias.as_str(); 9].join(", ")).unwrap();
    }
    assert!(refused("billion laughs", &laughs).contains(&Kind::Yaml));
    assert!(refused("alias of itself", "name: &a [*a]\n").contains(&Kind::Yaml));
    assert!(refused("many anchors", filled("name: n\nx: [", "&a b, ", "]")).contains(&Kind::Yaml));
    assert!(refused("many aliases", filled("name: n\nx: [", "*a, ", "]")).contains(&Kind::Yaml));
    let long = format!("name: n\nx: [{}]", format!("&{} b, ", "a".repeat(1000)).repeat(1000));
    assert!(refused("long anchors", long).contains(&Kind::Yaml));
}

#[test]
fn nesting_without_end() {
    assert_eq!(refused("brackets", filled("name: ", "[", "")), [Kind::Limit]);
    assert_eq!(refused("braces", filled("name: ", "{", "")), [Kind::Limit]);
    assert_eq!(refused("keys of flow mappings", filled("name: ", "{a: ", "")), [Kind::Limit]);
    assert_eq!(refused("dashes", filled("name:\n  ", "- ", "x")), [Kind::Limit]);
    assert_eq!(refused("explicit keys", filled("", "? ", "x")), [Kind::Limit]);
    let mut stairs = String::new();
    for depth in 0..1000 {
        writeln!(stairs, "{}a:", " ".repeat(depth)).unwrap();
    }
    assert_eq!(refused("stairs", &stairs), [Kind::Limit]);
    let brackets = format!("name: {}{}", "[".repeat(15), "]".repeat(15));
    assert!(!refused("fifteen brackets", brackets).contains(&Kind::Limit));
}

#[test]
fn too_many_of_anything() {
    let mut actions = "name: n\nactions:\n".to_owned();
    for action in 0..100_000 {
        writeln!(actions, " {action}:").unwrap();
    }
    assert!(actions.len() < MAX_MANIFEST_BYTES);
    assert_eq!(refused("100,000 actions", &actions), [Kind::Limit]);
    let more: String =
        (0..100_000).fold("name: n\nactions:\n".to_owned(), |text, n| text + &format!("  action{n}:\n"));
    assert_eq!(refused("100,000 actions with longer names", more), [Kind::Limit]);
    assert_eq!(refused("items", filled("name: n\nactions: {a: {commands: [", "a,", "]}}")), [Kind::Limit]);
    assert_eq!(
        refused("commands", filled("name: n\nactions:\n a:\n  commands:\n", "  - a\n", "")),
        [Kind::Limit]
    );
    let variables: String = (0..257).map(|n| format!("A{n}: x, ")).collect();
    let env = |variables: &str| format!("name: n\nenv: {{{variables}}}\nactions: {{a: {{commands: [x]}}}}");
    assert_eq!(refused("variables", env(&variables)), [Kind::Limit]);
    let large = format!("A: {0}, B: {0}", "x".repeat(20 << 10));
    assert_eq!(refused("large variables", env(&large)), [Kind::Limit]);
    let unknown: String = (0..90_000).map(|n| format!("comand{n}: \n")).collect();
    assert!(
        refused("unknown keys", unknown.get(..MAX_MANIFEST_BYTES).unwrap_or(&unknown))
            .contains(&Kind::UnknownKey)
    );
    let doubles = filled("name: n\n", "a: bcdef\n", "actions: {a: {commands: [x]}}");
    assert_eq!(refused("doubled keys", doubles), [Kind::Duplicate]);
    let labels: String = (0..65).map(|n| format!("l{n}: x, ")).collect();
    let labels =
        format!("name: n\nactions: {{a: {{commands: [x], configuration: {{labels: {{{labels}}}}}}}}}");
    assert_eq!(refused("labels", labels), [Kind::Limit]);
}

#[test]
fn huge_texts() {
    let head = "name: n\nactions: {a: {commands: [x]}}\n";
    let oversize = filled("", "a", "a") + "b";
    assert_eq!(refused("over 1 MiB", oversize), [Kind::Limit]);
    assert_eq!(refused("64 MiB", vec![b'a'; 64 << 20]), [Kind::Limit]);
    assert_eq!(refused("plain text", filled("name: ", "a", "")), [Kind::Limit, Kind::Missing]);
    assert_eq!(
        refused("plain text of many lines", filled("name: ", "a\n ", "")),
        [Kind::Limit, Kind::Missing]
    );
    assert_eq!(refused("quoted text", filled("name: \"", "\\n", "\"")), [Kind::Limit, Kind::Missing]);
    assert_eq!(refused("quoted text without end", filled("name: \"", "a", "")), [Kind::Syntax]);
    assert_eq!(refused("block text", filled("name: |\n", " a\n", "")), [Kind::Limit, Kind::Missing]);
    assert_eq!(refused("long key", filled(head, "a", ": b")), [Kind::Syntax]);
    assert_eq!(refused("quoted long key", filled(&format!("{head}\""), "a", "\": b")), [Kind::Syntax]);
    assert!(!refused("blanks", filled("name:", " ", "")).is_empty());
    assert!(!refused("blank lines", filled("name: |\n", "\n", "")).is_empty());
    assert!(!refused("comments", filled("", "#\n", "")).is_empty());
    assert!(!refused("one comment", filled("", "#", "")).is_empty());
    assert!(!refused("documents", filled("", "---\n", "")).is_empty());
    assert!(!refused("directives", filled("", "%A b\n", "")).is_empty());
    assert!(!refused("one directive", filled("%A", " b", "")).is_empty());
    assert!(!refused("tags", filled("name: [", "!a b,", "]")).is_empty());
    assert!(!refused("a long tag", filled("name: !", "a", " b")).is_empty());
    assert!(!refused("colons", filled("name: ", ":", "")).is_empty());
    assert!(!refused("question marks", filled("name: [", "? a,", "]")).is_empty());
    assert!(!refused("empty keys", filled("{", ": ,", "}")).is_empty());
    assert!(!refused("carriage returns", filled("name:", "\r", "")).is_empty());
    assert!(!refused("tabs", filled("name:", "\t", "")).is_empty());
    assert!(!refused("zero bytes", filled("", "\0", "")).is_empty());
    assert!(!refused("control characters", filled("", "a\u{1b}", "")).is_empty());
    assert!(!refused("bidirectional marks", filled("name: ", "\u{202e}", "")).is_empty());
}

#[test]
fn graphs_that_cost() {
    let names: Vec<String> = (0..512).map(|n| format!("{n:04}{}", "n".repeat(30))).collect();
    let manifest = |needs: &dyn Fn(usize) -> String| {
        let mut text = "name: n\nactions:\n".to_owned();
        for (index, name) in names.iter().enumerate() {
            writeln!(text, "  {name}: {{commands: [x], needs: [{}]}}", needs(index)).unwrap();
        }
        text
    };
    assert_eq!(refused("one cycle of all", manifest(&|n| names[(n + 1) % 512].clone())), [Kind::Cycle]);
    assert_eq!(refused("256 cycles", manifest(&|n| names[n ^ 1].clone())), [Kind::Cycle]);
    let dense = manifest(&|n| (1..50).map(|k| names[(n + k) % 512].clone()).collect::<Vec<_>>().join(", "));
    assert!(dense.len() < MAX_MANIFEST_BYTES);
    assert_eq!(refused("a dense cycle", dense), [Kind::Cycle]);
    let unknown = manifest(&|n| format!("{n:04}{}", "m".repeat(30)));
    assert_eq!(refused("unknown names alike", unknown), [Kind::UnknownAction]);
}
