//! Knows the keys of the language: which a section takes, which it will take, and what a wrong one was likely meant as.

use super::source::quoted;

/// A kind of mapping in a manifest.
#[derive(Debug)]
pub(super) struct Section {
    /// "an action".
    pub(super) what: &'static str,
    pub(super) offered: &'static [&'static str],
    /// In the language, and not in this version.
    pub(super) later: &'static [&'static str],
}

pub(super) const PIPELINE: Section = Section {
    what: "a pipeline",
    offered: &["name", "env", "actions"],
    later: &["on", "concurrency", "defaults", "release", "include"],
};
pub(super) const ACTION: Section = Section {
    what: "an action",
    offered: &[
        "needs",
        "configuration",
        "services",
        "env",
        "cache",
        "uses",
        "commands",
        "shell",
        "artifacts",
        "reports",
        "timeout",
        "retry",
        "exclusive",
        "allow-failure",
    ],
    later: &["if", "matrix", "secrets", "approval", "priority", "finally", "extends"],
};
pub(super) const CONFIGURATION: Section = Section {
    what: "`configuration`",
    offered: &["container", "executor", "resources", "labels", "network"],
    later: &[],
};
pub(super) const CONTAINER: Section =
    Section { what: "`container`", offered: &["image", "pull", "entrypoint", "user"], later: &[] };
pub(super) const SERVICE: Section =
    Section { what: "a service", offered: &["container", "command", "env", "ready"], later: &[] };
pub(super) const READY: Section = Section { what: "`ready`", offered: &["command", "timeout"], later: &[] };
pub(super) const CACHE: Section =
    Section { what: "a cache", offered: &["key", "restore", "paths"], later: &[] };
pub(super) const ARTIFACTS: Section =
    Section { what: "`artifacts`", offered: &["paths", "when", "keep"], later: &[] };
pub(super) const REPORTS: Section = Section { what: "`reports`", offered: &["junit"], later: &[] };
pub(super) const RETRY: Section = Section { what: "`retry`", offered: &["times", "on"], later: &[] };
pub(super) const RESOURCES: Section =
    Section { what: "`resources`", offered: &["cpu", "memory"], later: &["disk"] };
pub(super) const NETWORK: Section = Section { what: "`network`", offered: &["allow"], later: &[] };

/// Where a key has several places, the first one names it.
const SECTIONS: [&Section; 12] = [
    &PIPELINE,
    &ACTION,
    &CONFIGURATION,
    &CONTAINER,
    &RESOURCES,
    &NETWORK,
    &SERVICE,
    &READY,
    &CACHE,
    &ARTIFACTS,
    &REPORTS,
    &RETRY,
];

/// What other systems call what we have.
const ELSEWHERE: [(&str, &str); 23] = [
    ("after", "needs"),
    ("depends_on", "needs"),
    ("dependencies", "needs"),
    ("environment", "env"),
    ("variables", "env"),
    ("image", "container"),
    ("jobs", "actions"),
    ("stages", "actions"),
    ("runs-on", "labels"),
    ("tags", "labels"),
    ("run", "commands"),
    ("script", "commands"),
    ("steps", "commands"),
    ("continue-on-error", "allow-failure"),
    ("allow_failure", "allow-failure"),
    ("timeout-minutes", "timeout"),
    ("mem", "memory"),
    ("attempts", "retry"),
    ("retries", "retry"),
    ("restore-keys", "restore"),
    ("fallback_keys", "restore"),
    ("expire_in", "keep"),
    ("retention-days", "keep"),
];

/// How to leave out a key that is not offered yet.
pub(super) fn mend_of_later(key: &str) -> String {
    match key {
        "on" => "leave it out: for now the monitor's configuration chooses the events".to_owned(),
        "include" | "extends" => "write out what it would bring in".to_owned(),
        "matrix" => "write one action for each combination".to_owned(),
        "if" => "test for it in the commands".to_owned(),
        _ => "leave it out: a later version will take it".to_owned(),
    }
}

/// Where a key of this name has its place.
fn place_of(key: &str) -> Option<&'static Section> {
    SECTIONS.into_iter().find(|section| section.offered.contains(&key) || section.later.contains(&key))
}

/// The key that was likely meant by one that `section` does not have; it may be another section's.
pub(super) fn meant(key: &str, section: &Section) -> Option<&'static str> {
    if place_of(key).is_some() {
        return None;
    }
    let here = section.offered.iter().chain(section.later).copied();
    nearest(key, here).or_else(|| ELSEWHERE.iter().find(|(theirs, _)| *theirs == key).map(|(_, ours)| *ours))
}

/// What to do about a key that `section` does not have.
pub(super) fn mend_of_unknown(key: &str, section: &Section) -> String {
    if key == "<<" {
        return "write the keys out: manifests have no merge keys".to_owned();
    }
    if let Some(place) = place_of(key) {
        return format!("{} belongs in {}", quoted(key), place.what);
    }
    let known = |key: &str| section.offered.contains(&key) || section.later.contains(&key);
    match meant(key, section).map(|meant| (meant, place_of(meant))) {
        Some((meant, Some(place))) if !known(meant) => format!("did you mean `{meant}`, in {}?", place.what),
        Some((meant, _)) => format!("did you mean `{meant}`?"),
        None => {
            let offered: Vec<String> = section.offered.iter().map(|key| format!("`{key}`")).collect();
            format!("{} takes {}", section.what, offered.join(", "))
        }
    }
}

/// The candidate that was likely meant. Of equally near ones the first.
pub(super) fn nearest<'c>(written: &str, candidates: impl Iterator<Item = &'c str>) -> Option<&'c str> {
    /// The distance costs the product of two lengths; longer names are not compared.
    const COMPARED_BYTES: usize = 40;
    if written.len() > COMPARED_BYTES {
        return None;
    }
    let most = (written.chars().count() / 3).max(1);
    let lower = written.to_lowercase();
    candidates
        .filter(|candidate| {
            candidate.len() <= COMPARED_BYTES && candidate.len().abs_diff(written.len()) <= most
        })
        .map(|candidate| (strsim::osa_distance(&lower, &candidate.to_lowercase()), candidate))
        .filter(|(distance, _)| *distance <= most)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_key_finds_what_was_meant() {
        for (key, section, mend) in [
            ("comands", &ACTION, "did you mean `commands`?"),
            ("Commands", &ACTION, "did you mean `commands`?"),
            ("allow_failure", &ACTION, "did you mean `allow-failure`?"),
            ("timeout", &PIPELINE, "`timeout` belongs in an action"),
            ("container", &ACTION, "`container` belongs in `configuration`"),
            ("image", &ACTION, "`image` belongs in `container`"),
            ("script", &ACTION, "did you mean `commands`?"),
            ("runs-on", &ACTION, "did you mean `labels`, in `configuration`?"),
            ("jobs", &PIPELINE, "did you mean `actions`?"),
            ("artefacts", &ACTION, "did you mean `artifacts`?"),
            ("<<", &ACTION, "write the keys out: manifests have no merge keys"),
            ("zzzzzz", &RESOURCES, "`resources` takes `cpu`, `memory`"),
        ] {
            assert_eq!(mend_of_unknown(key, section), mend, "{key}");
        }
    }
}
