//! Reads any bytes as messages of agents, schedulers and controllers: what is taken for good means the same when it is sent on.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use prost::Message;
use sealci_core::attempt::JournalEntry;
use sealci_core::ids::AttemptId;
use sealci_core::outcome::Outcome;
use sealci_core::plan::{Artifacts, Cache, Container, Resources, Service};
use sealci_fuzz::{Input, within};
use sealci_proto::{Malformed, agent, attempt_id, scheduler};

fn decoded<M: Message + Default>(bytes: &[u8]) -> Option<M> {
    // A map's entry of two bytes takes some hundred in memory.
    let message = within(512 * bytes.len() + 4096, || M::decode(bytes)).ok()?;
    Some(message)
}

/// What is taken for good is the same when it is sent on.
fn survives<M, T>(wire: &M, read: impl Fn(&M) -> Result<T, Malformed>, write: impl Fn(&T) -> M)
where
    M: Message + Default,
    T: Debug + PartialEq,
{
    if let Ok(value) = read(wire) {
        let sent = write(&value).encode_to_vec();
        assert_eq!(read(&M::decode(sent.as_slice()).expect("what was encoded")), Ok(value));
    }
}

fn service(wire: &agent::Service) {
    survives(wire, |wire| Service::try_from(wire), |value| value.into());
    wire.container.iter().for_each(container);
}

fn container(wire: &agent::Container) {
    survives(wire, |wire| Container::try_from(wire), |value| value.into());
}

fn cache(wire: &agent::Cache) {
    survives(wire, |wire| Cache::try_from(wire), |value| value.into());
}

fn artifacts(wire: &agent::Artifacts) {
    survives(wire, |wire| Artifacts::try_from(wire), |value| value.into());
}

fn spec(wire: &agent::ActionSpec) {
    wire.container.iter().for_each(container);
    wire.services.iter().for_each(service);
    wire.caches.iter().for_each(cache);
    wire.artifacts.iter().for_each(artifacts);
}

fn event(wire: &agent::Event) {
    // Either way nothing panics, and what a refusal says can be shown.
    let read = JournalEntry::try_from(wire).map_err(|malformed| malformed.to_string());
    if let Ok(JournalEntry::Finished { outcome, .. }) = read {
        assert_eq!(Outcome::try_from(&agent::Outcome::from(&outcome)), Ok(outcome));
    }
    attempt(&wire.attempt);
}

fn attempt(wire: &Option<agent::AttemptRef>) {
    if let Ok(id) = attempt_id(wire) {
        assert_eq!(AttemptId::try_from(&agent::AttemptRef::from(id)), Ok(id));
    }
}

fn chunk(wire: &agent::LogChunk) {
    attempt(&wire.attempt);
    if let Ok(range) = sealci_proto::log_range(wire) {
        assert!(range.start < range.end && wire.data.len() <= sealci_proto::MAX_LOG_CHUNK_BYTES);
        assert!(wire.gap.is_some() || range.end - range.start == wire.data.len() as u64);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let kind = input.byte() % 11;
    let bytes = input.rest();
    match kind {
        0 => decoded(bytes).iter().for_each(service),
        1 => decoded(bytes).iter().for_each(cache),
        2 => decoded(bytes).iter().for_each(artifacts),
        3 => decoded(bytes).iter().for_each(event),
        4 => decoded(bytes).iter().for_each(spec),
        5 => decoded(bytes).iter().for_each(container),
        6 => decoded(bytes).iter().for_each(chunk),
        7 => decoded::<agent::AgentMessage>(bytes).iter().for_each(|message| match &message.body {
            Some(agent::agent_message::Body::Event(wire)) => event(wire),
            Some(agent::agent_message::Body::LogChunk(wire)) => chunk(wire),
            _ => {}
        }),
        8 => decoded::<agent::Resources>(bytes).into_iter().for_each(|wire| {
            assert_eq!(agent::Resources::from(Resources::from(wire)), wire);
        }),
        9 => drop(decoded::<scheduler::ControllerMessage>(bytes)),
        _ => drop(decoded::<scheduler::SchedulerMessage>(bytes)),
    }
});
