//! Works out what a look at a repository means: which refs moved, and which of those moves are events. Pure.

use std::collections::{HashMap, HashSet};

use sealci_core::event::{Event, EventKind, RefName, Revision};
use sealci_git::RemoteRef;

use crate::configuration::Settings;

/// The revision at which each ref was last seen. Every branch and tag has one, also those that no filter wants: so that
/// wanting more later makes no events of the past.
pub type Cursors = HashMap<RefName, Revision>;

/// What one look found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Refs that are new or moved, in the order they were listed.
    pub moved: Vec<RemoteRef>,
    /// Refs that are gone.
    pub gone: Vec<RefName>,
    /// Of those moved, the ones that become events.
    pub events: Vec<Event>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.moved.is_empty() && self.gone.is_empty()
    }

    /// Compares what stands in the repository with what was seen before; `None` when it was never looked at.
    ///
    /// A ref that moved several times since gives one event, for where it is now.
    pub fn between(before: Option<&Cursors>, now: &[RemoteRef], settings: &Settings) -> Self {
        let empty = Cursors::new();
        let known = before.unwrap_or(&empty);
        let moved: Vec<RemoteRef> =
            now.iter().filter(|found| known.get(&found.name) != Some(&found.revision)).cloned().collect();
        let standing: HashSet<&RefName> = now.iter().map(|found| &found.name).collect();
        let mut gone: Vec<RefName> = known.keys().filter(|name| !standing.contains(name)).cloned().collect();
        gone.sort();
        let events = if before.is_some() || settings.build_existing {
            moved.iter().filter(|found| is_wanted(&found.name, settings)).map(event_of).collect()
        } else {
            Vec::new()
        };
        Self { moved, gone, events }
    }

    /// Brings the cursors to where the repository is.
    pub fn apply(&self, cursors: &mut Cursors) {
        for name in &self.gone {
            cursors.remove(name);
        }
        cursors.extend(self.moved.iter().map(|found| (found.name.clone(), found.revision.clone())));
    }
}

fn event_of(found: &RemoteRef) -> Event {
    Event {
        kind: Event::kind_of_ref(&found.name),
        r#ref: Some(found.name.clone()),
        revision: found.revision.clone(),
    }
}

fn is_wanted(name: &RefName, settings: &Settings) -> bool {
    let kind_is_wanted =
        settings.events.iter().any(|kind| EventKind::from(*kind) == Event::kind_of_ref(name));
    let filter = match Event::kind_of_ref(name) {
        EventKind::Tag => &settings.tags,
        _ => &settings.branches,
    };
    kind_is_wanted && filter.fits(name.short())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::configuration::SettingsInput;

    fn settings(json: serde_json::Value) -> Settings {
        let mut json = json;
        json["repository_url"] = "https://h/o/r".into();
        let input: SettingsInput = serde_json::from_value(json).unwrap();
        input.validate(&sealci_git::AllowedTransports::default(), &|_| true).unwrap().0
    }

    fn found(name: &str, digit: char) -> RemoteRef {
        RemoteRef { name: name.parse().unwrap(), revision: digit.to_string().repeat(40).parse().unwrap() }
    }

    fn cursors(refs: &[RemoteRef]) -> Cursors {
        refs.iter().map(|found| (found.name.clone(), found.revision.clone())).collect()
    }

    fn events(changes: &Changes) -> Vec<(&str, String)> {
        let name =
            |event: &Event| format!("{} {}", event.r#ref.as_ref().unwrap(), &event.revision.as_str()[..1]);
        changes.events.iter().map(|event| (event.kind.as_str(), name(event))).collect()
    }

    #[test]
    fn the_first_look_is_a_baseline_unless_asked() {
        let now = [found("refs/heads/main", 'a'), found("refs/tags/v1", 'b')];
        let first = Changes::between(None, &now, &settings(serde_json::json!({})));
        assert_eq!((first.moved.len(), first.events.len()), (2, 0));
        let json = serde_json::json!({"build_existing": true, "events": ["push", "tag"]});
        let first = Changes::between(None, &now, &settings(json));
        assert_eq!(events(&first), [("push", "refs/heads/main a".into()), ("tag", "refs/tags/v1 b".into())]);
    }

    #[test]
    fn what_moved_or_came_is_an_event_and_what_went_is_forgotten() {
        let before = cursors(&[
            found("refs/heads/main", 'a'),
            found("refs/heads/old", 'b'),
            found("refs/heads/x", 'c'),
        ]);
        let now = [found("refs/heads/main", 'd'), found("refs/heads/x", 'c'), found("refs/heads/new", 'a')];
        let changes = Changes::between(Some(&before), &now, &settings(serde_json::json!({})));
        let expected = [("push", "refs/heads/main d".to_owned()), ("push", "refs/heads/new a".to_owned())];
        assert_eq!(events(&changes), expected);
        let mut after = before.clone();
        changes.apply(&mut after);
        assert_eq!(after, cursors(&now));
        assert!(Changes::between(Some(&after), &now, &settings(serde_json::json!({}))).is_empty());
    }

    #[test]
    fn cursors_follow_refs_that_no_filter_wants() {
        let json = serde_json::json!({"branches": ["main"], "events": ["push", "tag"], "tags": ["v*"]});
        let now = ["refs/heads/main", "refs/heads/other", "refs/tags/v1", "refs/tags/nightly"]
            .map(|name| found(name, 'a'));
        let changes = Changes::between(Some(&Cursors::new()), &now, &settings(json));
        assert_eq!(
            events(&changes),
            [("push", "refs/heads/main a".into()), ("tag", "refs/tags/v1 a".into())]
        );
        assert_eq!(changes.moved.len(), 4);
    }
}
