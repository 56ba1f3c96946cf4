//! Checks that the crates depend on one another the right way only:
//!
//! ```text
//! core ← proto, api ← services ← sealci ← tests
//! ```
//! Services meet through contracts and never import one another; the guest's init imports nothing of ours.

use anyhow::{Result, bail};
use serde_json::Value;

use crate::workspace;

/// Which of our crates each of our crates may import, in any kind of dependency.
const ALLOWED: &[(&str, &[&str])] = &[
    ("sealci-core", &[]),
    ("sealci-service", &[]),
    ("sealci-guest", &[]),
    ("sealci-image", &[]),
    ("sealci-archive", &[]),
    // Its tests speak with the init of a machine.
    ("sealci-microvm", &["sealci-image", "sealci-guest"]),
    ("sealci-vmm", &[]),
    ("sealci-api", &["sealci-core"]),
    ("sealci-proto", &["sealci-core"]),
    ("sealci-git", &["sealci-core"]),
    ("sealci-sandbox", &["sealci-guest"]),
    ("sealci-monitor", &["sealci-core", "sealci-api", "sealci-git", "sealci-service"]),
    (
        "sealci-controller",
        &["sealci-core", "sealci-api", "sealci-proto", "sealci-git", "sealci-service", "sealci-archive"],
    ),
    ("sealci-scheduler", &["sealci-core", "sealci-proto", "sealci-service"]),
    (
        "sealci-agent",
        &[
            "sealci-core",
            "sealci-proto",
            "sealci-git",
            "sealci-service",
            "sealci-guest",
            "sealci-sandbox",
            "sealci-image",
            "sealci-microvm",
            "sealci-vmm",
            "sealci-api",
            "sealci-archive",
        ],
    ),
    ("sealci-release-agent", &["sealci-core", "sealci-proto", "sealci-api", "sealci-git", "sealci-service"]),
    (
        "sealci",
        &[
            "sealci-core",
            "sealci-api",
            "sealci-proto",
            "sealci-git",
            "sealci-service",
            "sealci-monitor",
            "sealci-controller",
            "sealci-scheduler",
            "sealci-agent",
            "sealci-sandbox",
            "sealci-guest",
            "sealci-image",
            "sealci-microvm",
            "sealci-archive",
            "sealci-release-agent",
        ],
    ),
    // Plays the services together, in one process, for tests; nothing imports it.
    (
        "sealci-simulation",
        &[
            "sealci-core",
            "sealci-proto",
            "sealci-service",
            "sealci-agent",
            "sealci-controller",
            "sealci-scheduler",
        ],
    ),
    ("sealci-fuzz", &["sealci-archive", "sealci-core", "sealci-guest", "sealci-proto", "sealci-vmm"]),
    ("xtask", &[]),
];

/// The end of the chain: it may import everything, and nothing imports it.
const LAST: &str = "sealci-tests";

/// Fails with every import that runs another way.
pub fn check() -> Result<()> {
    let complaints = complaints(&workspace::metadata()?);
    if complaints.is_empty() {
        return Ok(());
    }
    bail!(
        "{}\nthe table stands in xtask/src/imports.rs, the reasons in ARCHITECTURE.md",
        complaints.join("\n")
    );
}

fn complaints(metadata: &Value) -> Vec<String> {
    let empty = Vec::new();
    let packages = metadata["packages"].as_array().unwrap_or(&empty);
    let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
    let ours: Vec<String> = packages.iter().map(name).collect();
    let mut complaints = Vec::new();
    for package in packages {
        let importer = name(package);
        if importer == LAST {
            continue;
        }
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == importer) else {
            complaints.push(format!("{importer} is not in the table: say what it may import"));
            continue;
        };
        let dependencies = package["dependencies"].as_array().unwrap_or(&empty);
        for imported in dependencies.iter().map(name).filter(|imported| ours.contains(imported)) {
            // A crate's tests may import it with other features.
            if imported != importer && !allowed.contains(&imported.as_str()) {
                complaints.push(format!("{importer} must not import {imported}"));
            }
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn package(name: &str, imports: &[&str]) -> Value {
        let dependencies: Vec<_> = imports.iter().map(|name| json!({"name": name})).collect();
        json!({"name": name, "dependencies": dependencies})
    }

    #[test]
    fn the_workspace_keeps_to_the_table() {
        check().unwrap();
    }

    #[test]
    fn an_import_the_other_way_is_found() {
        let metadata = json!({"packages": [
            package("sealci-core", &["sealci-proto", "serde"]),
            package("sealci-proto", &["sealci-core"]),
            package("sealci-agent", &["sealci-controller", "sealci-core"]),
            package("sealci-controller", &["sealci-tests"]),
            package("sealci-tests", &["sealci-core", "sealci-agent"]),
            package("sealci-new", &[]),
        ]});
        assert_eq!(
            complaints(&metadata),
            [
                "sealci-core must not import sealci-proto",
                "sealci-agent must not import sealci-controller",
                "sealci-controller must not import sealci-tests",
                "sealci-new is not in the table: say what it may import",
            ]
        );
    }

    #[test]
    fn the_table_itself_runs_one_way() {
        // Following the table from any crate never leads back to it.
        fn reaches(from: &str, to: &str) -> bool {
            let allowed =
                ALLOWED.iter().find(|(name, _)| *name == from).map_or(&[][..], |(_, allowed)| allowed);
            allowed.iter().any(|next| *next == to || reaches(next, to))
        }
        for (name, _) in ALLOWED {
            assert!(!reaches(name, name), "{name}");
        }
    }
}
