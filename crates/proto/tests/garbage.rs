//! Converts messages that a broken or hostile peer may send: none of them panics, and what is taken for good means the same
//! when it is sent on.

#![allow(clippy::unwrap_used)]

use std::fmt::Debug;

use proptest::prelude::*;
use prost::Message;
use sealci_core::attempt::JournalEntry;
use sealci_core::ids::AttemptId;
use sealci_core::outcome::Outcome;
use sealci_core::plan::{Artifacts, Cache, Container, Service};
use sealci_proto::Malformed;
use sealci_proto::agent::{self, container, event, outcome};

/// Texts that mean something somewhere.
const KNOWN: &[&str] = &[
    "",
    "if-missing",
    "always",
    "never",
    "succeeded",
    "failed",
    "memory",
    "agent_lost",
    "executor",
    "a-b",
    "${{ hash('b') }}",
    "${{",
    "018f0000-0000-7000-8000-00000000000a",
    "out/**",
    "../x",
    "~/c",
    "/etc",
];

/// Those, and others.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![4 => prop::sample::select(KNOWN).prop_map(str::to_owned), 1 => any::<String>()]
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(text(), 0..3)
}

fn container() -> impl Strategy<Value = agent::Container> {
    use container::Entrypoint;
    let entrypoint = prop_oneof![
        Just(Entrypoint::ImageEntrypoint(agent::ImageEntrypoint {})),
        texts().prop_map(|words| Entrypoint::Words(agent::Words { words })),
    ];
    (text(), text(), prop::option::of(entrypoint), text())
        .prop_map(|(image, pull, entrypoint, user)| agent::Container { image, pull, entrypoint, user })
}

fn service() -> impl Strategy<Value = agent::Service> {
    let ready = (text(), any::<u64>()).prop_map(|(command, timeout_ms)| agent::Ready { command, timeout_ms });
    let env = prop::collection::vec((text(), text()), 0..3);
    (text(), prop::option::of(container()), prop::option::of(texts()), env, prop::option::of(ready)).prop_map(
        |(name, container, command, env, ready)| agent::Service {
            name,
            container,
            command: command.map(|words| agent::Words { words }),
            env: env.into_iter().collect(),
            ready,
        },
    )
}

fn outcome() -> impl Strategy<Value = agent::Outcome> {
    use outcome::{Cancelled, Errored, Failed, Kind, Succeeded, TimedOut};
    let kind = prop_oneof![
        Just(Kind::Succeeded(Succeeded {})),
        (any::<i32>(), text()).prop_map(|(exit_code, limit)| Kind::Failed(Failed { exit_code, limit })),
        (text(), text()).prop_map(|(cause, message)| Kind::Errored(Errored { cause, message })),
        Just(Kind::Cancelled(Cancelled {})),
        Just(Kind::TimedOut(TimedOut {})),
    ];
    prop::option::of(kind).prop_map(|kind| agent::Outcome { kind })
}

fn event() -> impl Strategy<Value = agent::Event> {
    let attempt =
        (text(), any::<u32>()).prop_map(|(action_id, number)| agent::AttemptRef { action_id, number });
    let body = prop_oneof![
        text().prop_map(|executor| event::Body::Running(agent::Running { executor })),
        (prop::option::of(outcome()), any::<u64>()).prop_map(|(outcome, log_length)| {
            event::Body::Finished(agent::Finished { outcome, log_length })
        }),
    ];
    (prop::option::of(attempt), any::<(u64, u64)>(), prop::option::of(body)).prop_map(
        |(attempt, (token, sequence), body)| agent::Event { attempt, token, sequence, at_unix_ms: 0, body },
    )
}

/// What becomes of a message's bytes on a bad way: one is another, the end is missing, or neither.
#[derive(Debug, Clone)]
struct Damage {
    at: prop::sample::Index,
    with: u8,
    kept: prop::sample::Index,
    happens: [bool; 2],
}

fn damage() -> impl Strategy<Value = Damage> {
    (any::<prop::sample::Index>(), 1_u8.., any::<prop::sample::Index>(), any::<[bool; 2]>())
        .prop_map(|(at, with, kept, happens)| Damage { at, with, kept, happens })
}

/// The message as it arrives, if it can be read at all.
fn arrived<M: Message + Default>(message: &M, damage: &Damage) -> Option<M> {
    let mut bytes = message.encode_to_vec();
    if !bytes.is_empty() && damage.happens[0] {
        let at = damage.at.index(bytes.len());
        bytes[at] ^= damage.with;
    }
    if !bytes.is_empty() && damage.happens[1] {
        bytes.truncate(damage.kept.index(bytes.len()));
    }
    M::decode(bytes.as_slice()).ok()
}

/// What is taken for good is the same when it is sent on.
fn survives<M, T: Debug + PartialEq>(
    wire: &M,
    read: impl Fn(&M) -> Result<T, Malformed>,
    write: impl Fn(&T) -> M,
) {
    if let Ok(value) = read(wire) {
        assert_eq!(read(&write(&value)), Ok(value));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn services_mean_the_same_when_sent_on(service in service(), damage in damage()) {
        if let Some(wire) = arrived(&service, &damage) {
            survives(&wire, |wire| Service::try_from(wire), |value| value.into());
            if let Some(container) = &wire.container {
                survives(container, |wire| Container::try_from(wire), |value| value.into());
            }
        }
    }

    #[test]
    fn caches_mean_the_same_when_sent_on(
        (key, restore, paths) in (text(), texts(), texts()),
        damage in damage(),
    ) {
        if let Some(wire) = arrived(&agent::Cache { key, restore, paths }, &damage) {
            survives(&wire, |wire| Cache::try_from(wire), |value| value.into());
        }
    }

    #[test]
    fn artifacts_mean_the_same_when_sent_on(
        (paths, when, keep_ms) in (texts(), text(), any::<u64>()),
        damage in damage(),
    ) {
        if let Some(wire) = arrived(&agent::Artifacts { paths, when, keep_ms }, &damage) {
            survives(&wire, |wire| Artifacts::try_from(wire), |value| value.into());
        }
    }

    #[test]
    fn events_are_read_or_refused(event in event(), damage in damage()) {
        if let Some(wire) = arrived(&event, &damage) {
            // Either way nothing panics, and what a refusal says can be shown.
            let read = JournalEntry::try_from(&wire).map_err(|malformed| malformed.to_string());
            if let Ok(JournalEntry::Finished { outcome, .. }) = read {
                assert_eq!(Outcome::try_from(&agent::Outcome::from(&outcome)), Ok(outcome));
            }
            if let Ok(id) = sealci_proto::attempt_id(&wire.attempt) {
                assert_eq!(AttemptId::try_from(&agent::AttemptRef::from(id)), Ok(id));
            }
        }
    }
}
