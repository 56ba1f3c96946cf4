//! Converts between the wire and the core. What comes from the wire is checked here, once.

use std::ops::Range;
use std::time::Duration;

use sealci_core::attempt::{AttemptState, JournalEntry};
use sealci_core::destination::Destination;
use sealci_core::ids::AttemptId;
use sealci_core::outcome::{Cause, Limit, Outcome};
use sealci_core::plan::{
    Artifacts, Cache, Container, Entrypoint, Network, Pull, Ready, Resources, Service, When,
};
use sealci_core::template::Template;

use crate::agent::{self, event, outcome};

/// A message that is well-formed protobuf and yet means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed message: {0}")]
pub struct Malformed(pub String);

impl Malformed {
    /// A field that must be there is not.
    pub fn missing(field: &str) -> Self {
        Self(format!("`{field}` is missing"))
    }
}

impl From<sealci_core::ids::InvalidId> for Malformed {
    fn from(error: sealci_core::ids::InvalidId) -> Self {
        Self(error.to_string())
    }
}

impl From<AttemptId> for agent::AttemptRef {
    fn from(id: AttemptId) -> Self {
        Self { action_id: id.action.to_string(), number: id.number }
    }
}

impl TryFrom<&agent::AttemptRef> for AttemptId {
    type Error = Malformed;

    fn try_from(wire: &agent::AttemptRef) -> Result<Self, Malformed> {
        if wire.number == 0 {
            return Err(Malformed("attempts are numbered from 1".into()));
        }
        Ok(Self { action: wire.action_id.parse()?, number: wire.number })
    }
}

/// Reads the field that every message about an attempt has.
pub fn attempt_id(wire: &Option<agent::AttemptRef>) -> Result<AttemptId, Malformed> {
    wire.as_ref().ok_or_else(|| Malformed::missing("attempt"))?.try_into()
}

/// The most bytes of a log in one message.
pub const MAX_LOG_CHUNK_BYTES: usize = 1 << 20;

/// The stretch of its attempt's log that a chunk brings, as bytes or as a gap. Never empty.
pub fn log_range(wire: &agent::LogChunk) -> Result<Range<u64>, Malformed> {
    let bytes = wire.data.len();
    if bytes > MAX_LOG_CHUNK_BYTES {
        return Err(Malformed(format!(
            "a log chunk of {bytes} bytes, and {MAX_LOG_CHUNK_BYTES} are allowed"
        )));
    }
    let to = match &wire.gap {
        Some(_) if bytes > 0 => return Err(Malformed("a log chunk with data and a gap".into())),
        Some(gap) => Some(gap.to),
        None => wire.offset.checked_add(bytes as u64),
    };
    // Offsets are kept as signed numbers.
    let to = to.filter(|to| *to > wire.offset && i64::try_from(*to).is_ok());
    let to = to.ok_or_else(|| Malformed(format!("a log chunk at {} ends where none can", wire.offset)))?;
    Ok(wire.offset..to)
}

impl From<Resources> for agent::Resources {
    fn from(resources: Resources) -> Self {
        Self { cpu_millis: resources.cpu_millis, memory_bytes: resources.memory_bytes }
    }
}

impl From<agent::Resources> for Resources {
    fn from(wire: agent::Resources) -> Self {
        Self { cpu_millis: wire.cpu_millis, memory_bytes: wire.memory_bytes }
    }
}

/// As the two fields of an action that say it: which kind, and what is allowed.
pub fn network_to_wire(network: &Network) -> (agent::Network, Vec<String>) {
    match network {
        Network::On => (agent::Network::On, Vec::new()),
        Network::Off => (agent::Network::Off, Vec::new()),
        Network::Allow(destinations) => {
            (agent::Network::Allow, destinations.iter().map(Destination::to_string).collect())
        }
    }
}

/// Sealed by default: what is not said to be on is off.
pub fn network_from_wire(spec: &agent::ActionSpec) -> Result<Network, Malformed> {
    match spec.network() {
        agent::Network::On => Ok(Network::On),
        agent::Network::Off | agent::Network::Unspecified => Ok(Network::Off),
        agent::Network::Allow => {
            let read = |text: &String| {
                Destination::parse(text).map_err(|error| Malformed(format!("`network_allow`: {error}")))
            };
            Ok(Network::Allow(spec.network_allow.iter().map(read).collect::<Result<_, _>>()?))
        }
    }
}

impl From<&Container> for agent::Container {
    fn from(container: &Container) -> Self {
        use agent::container::Entrypoint as Wire;
        let entrypoint = match &container.entrypoint {
            Entrypoint::Default => None,
            Entrypoint::Image => Some(Wire::ImageEntrypoint(agent::ImageEntrypoint {})),
            Entrypoint::Words(words) => Some(Wire::Words(agent::Words { words: words.clone() })),
        };
        Self {
            image: container.image.clone(),
            pull: container.pull.as_str().to_owned(),
            entrypoint,
            user: container.user.clone().unwrap_or_default(),
        }
    }
}

impl TryFrom<&agent::Container> for Container {
    type Error = Malformed;

    fn try_from(wire: &agent::Container) -> Result<Self, Malformed> {
        use agent::container::Entrypoint as Wire;
        let entrypoint = match &wire.entrypoint {
            None => Entrypoint::Default,
            Some(Wire::ImageEntrypoint(_)) => Entrypoint::Image,
            Some(Wire::Words(words)) => Entrypoint::Words(words.words.clone()),
        };
        let pull =
            Pull::parse(&wire.pull).ok_or_else(|| Malformed(format!("nothing is pulled `{}`", wire.pull)))?;
        let user = Some(wire.user.clone()).filter(|user| !user.is_empty());
        Ok(Self { image: wire.image.clone(), pull, entrypoint, user })
    }
}

impl From<&Service> for agent::Service {
    fn from(service: &Service) -> Self {
        let ready = |ready: &Ready| agent::Ready {
            command: ready.command.clone(),
            timeout_ms: milliseconds(ready.timeout),
        };
        Self {
            name: service.name.clone(),
            container: Some((&service.container).into()),
            command: service.command.clone().map(|words| agent::Words { words }),
            env: service.env.clone().into_iter().collect(),
            ready: service.ready.as_ref().map(ready),
        }
    }
}

impl TryFrom<&agent::Service> for Service {
    type Error = Malformed;

    fn try_from(wire: &agent::Service) -> Result<Self, Malformed> {
        let container = wire.container.as_ref().ok_or_else(|| Malformed::missing("service.container"))?;
        let ready = |ready: &agent::Ready| Ready {
            command: ready.command.clone(),
            timeout: Duration::from_millis(ready.timeout_ms),
        };
        Ok(Self {
            name: wire.name.clone(),
            container: container.try_into()?,
            command: wire.command.as_ref().map(|command| command.words.clone()),
            env: wire.env.clone().into_iter().collect(),
            ready: wire.ready.as_ref().map(ready),
        })
    }
}

impl From<&Cache> for agent::Cache {
    fn from(cache: &Cache) -> Self {
        Self {
            key: cache.key.to_string(),
            restore: cache.restore.iter().map(ToString::to_string).collect(),
            paths: cache.paths.clone(),
        }
    }
}

impl TryFrom<&agent::Cache> for Cache {
    type Error = Malformed;

    fn try_from(wire: &agent::Cache) -> Result<Self, Malformed> {
        let template = |text: &String| Template::parse(text).map_err(|error| Malformed(error.to_string()));
        Ok(Self {
            key: template(&wire.key)?,
            restore: wire.restore.iter().map(template).collect::<Result<_, _>>()?,
            paths: wire.paths.clone(),
        })
    }
}

impl From<&Artifacts> for agent::Artifacts {
    fn from(artifacts: &Artifacts) -> Self {
        Self {
            paths: artifacts.paths.clone(),
            when: artifacts.when.as_str().to_owned(),
            keep_ms: artifacts.keep.map_or(0, milliseconds),
        }
    }
}

impl TryFrom<&agent::Artifacts> for Artifacts {
    type Error = Malformed;

    fn try_from(wire: &agent::Artifacts) -> Result<Self, Malformed> {
        let when = When::parse(&wire.when)
            .ok_or_else(|| Malformed(format!("no artifacts are kept when `{}`", wire.when)))?;
        let keep = (wire.keep_ms > 0).then(|| Duration::from_millis(wire.keep_ms));
        Ok(Self { paths: wire.paths.clone(), when, keep })
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What an attempt held by an agent says of itself.
impl From<&AttemptState> for agent::HeldState {
    fn from(state: &AttemptState) -> Self {
        match state {
            AttemptState::Assigned => Self::Assigned,
            AttemptState::Claimed => Self::Claimed,
            AttemptState::Running => Self::Running,
            AttemptState::Finished(_) => Self::Finished,
        }
    }
}

impl From<&Outcome> for agent::Outcome {
    /// A skipped action has no attempt; should one be asked for all the same, it is errored.
    fn from(outcome: &Outcome) -> Self {
        use outcome::{Cancelled, Errored, Failed, Kind, Succeeded, TimedOut};
        let kind = match outcome {
            Outcome::Succeeded => Kind::Succeeded(Succeeded {}),
            Outcome::Failed { exit_code, limit } => Kind::Failed(Failed {
                exit_code: *exit_code,
                limit: limit.map(|limit| limit.as_str().to_owned()).unwrap_or_default(),
            }),
            Outcome::Errored { cause, message } => {
                Kind::Errored(Errored { cause: cause.as_str().to_owned(), message: message.clone() })
            }
            Outcome::Cancelled => Kind::Cancelled(Cancelled {}),
            Outcome::TimedOut => Kind::TimedOut(TimedOut {}),
            Outcome::Skipped { because } => Kind::Errored(Errored {
                cause: Cause::Executor.as_str().to_owned(),
                message: because.clone(),
            }),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<&agent::Outcome> for Outcome {
    type Error = Malformed;

    fn try_from(wire: &agent::Outcome) -> Result<Self, Malformed> {
        use outcome::Kind;
        Ok(match wire.kind.as_ref().ok_or_else(|| Malformed::missing("outcome.kind"))? {
            Kind::Succeeded(_) => Self::Succeeded,
            Kind::Failed(failed) => {
                let limit = match failed.limit.as_str() {
                    "" => None,
                    name => Some(
                        Limit::parse(name)
                            .ok_or_else(|| Malformed(format!("no limit is called `{name}`")))?,
                    ),
                };
                Self::Failed { exit_code: failed.exit_code, limit }
            }
            Kind::Errored(errored) => Self::Errored {
                cause: Cause::parse(&errored.cause)
                    .ok_or_else(|| Malformed(format!("no cause is called `{}`", errored.cause)))?,
                message: errored.message.clone(),
            },
            Kind::Cancelled(_) => Self::Cancelled,
            Kind::TimedOut(_) => Self::TimedOut,
        })
    }
}

/// What an event decides; its times and figures are for showing and are read where they are stored.
impl TryFrom<&agent::Event> for JournalEntry {
    type Error = Malformed;

    fn try_from(wire: &agent::Event) -> Result<Self, Malformed> {
        Ok(match wire.body.as_ref().ok_or_else(|| Malformed::missing("event.body"))? {
            event::Body::Running(_) => Self::Running,
            event::Body::CommandStarted(started) => Self::CommandStarted { index: started.index },
            event::Body::CommandFinished(finished) => {
                Self::CommandFinished { index: finished.index, exit_code: finished.exit_code }
            }
            event::Body::Finished(finished) => Self::Finished {
                outcome: finished
                    .outcome
                    .as_ref()
                    .ok_or_else(|| Malformed::missing("finished.outcome"))?
                    .try_into()?,
                log_length: finished.log_length,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_of_an_attempt_survives_the_wire() {
        for outcome in [
            Outcome::Succeeded,
            Outcome::Failed { exit_code: 137, limit: Some(Limit::Memory) },
            Outcome::Failed { exit_code: 1, limit: None },
            Outcome::Errored { cause: Cause::DiskFull, message: "no room".into() },
            Outcome::Cancelled,
            Outcome::TimedOut,
        ] {
            assert_eq!(Outcome::try_from(&agent::Outcome::from(&outcome)), Ok(outcome));
        }
    }

    #[test]
    fn what_means_nothing_is_malformed() {
        assert!(Outcome::try_from(&agent::Outcome { kind: None }).is_err());
        let odd =
            outcome::Kind::Errored(outcome::Errored { cause: "bad_luck".into(), message: String::new() });
        assert!(Outcome::try_from(&agent::Outcome { kind: Some(odd) }).is_err());
        assert!(AttemptId::try_from(&agent::AttemptRef { action_id: "x".into(), number: 1 }).is_err());
        assert!(attempt_id(&None).is_err());
    }

    #[test]
    fn a_log_chunk_is_bounded_and_never_empty() {
        let chunk = |offset, bytes: usize, gap: Option<u64>| agent::LogChunk {
            offset,
            data: vec![7; bytes].into(),
            gap: gap.map(|to| agent::LogGap { to, reason: "x".into() }),
            ..Default::default()
        };
        let most = MAX_LOG_CHUNK_BYTES;
        assert_eq!(log_range(&chunk(3, most, None)), Ok(3..3 + most as u64));
        assert_eq!(log_range(&chunk(3, 0, Some(1 << 40))), Ok(3..1 << 40));
        for (offset, bytes, gap) in [
            (0, most + 1, None),
            (0, 0, None),
            (u64::MAX, 1, None),
            (3, 0, Some(3)),
            (3, 0, Some(u64::MAX)),
            (3, 0, Some(2)),
            (3, 1, Some(9)),
        ] {
            assert!(log_range(&chunk(offset, bytes, gap)).is_err(), "{offset} {bytes} {gap:?}");
        }
    }

    #[test]
    fn what_goes_beside_an_action_survives_the_wire() {
        for entrypoint in [Entrypoint::Default, Entrypoint::Image, Entrypoint::Words(vec!["sh".into()])] {
            let container = Container { entrypoint, user: Some("0:0".into()), ..Container::of("x") };
            let service = Service {
                name: "db".into(),
                container,
                command: Some(Vec::new()),
                env: [("A".to_owned(), "b".to_owned())].into(),
                ready: Some(Ready { command: "true".into(), timeout: Duration::from_secs(3) }),
            };
            assert_eq!(Service::try_from(&agent::Service::from(&service)), Ok(service));
        }
        let cache = Cache {
            key: Template::parse("a-${{ hash('b') }}").unwrap(),
            restore: vec![Template::parse("a-").unwrap()],
            paths: vec!["c".into()],
        };
        assert_eq!(Cache::try_from(&agent::Cache::from(&cache)), Ok(cache));
        for keep in [None, Some(Duration::from_secs(1))] {
            let artifacts = Artifacts { paths: vec!["a".into()], when: When::Failed, keep };
            assert_eq!(Artifacts::try_from(&agent::Artifacts::from(&artifacts)), Ok(artifacts));
        }
        assert!(Container::try_from(&agent::Container { pull: "now".into(), ..Default::default() }).is_err());
        assert!(Service::try_from(&agent::Service::default()).is_err());
        assert!(Cache::try_from(&agent::Cache { key: "${{".into(), ..Default::default() }).is_err());
        assert!(Artifacts::try_from(&agent::Artifacts::default()).is_err());
    }

    #[test]
    fn networks_come_back_and_what_is_not_known_is_off() {
        let allowed = vec![Destination::parse("*.example.org:443").unwrap()];
        for network in [Network::On, Network::Off, Network::Allow(allowed)] {
            let (kind, network_allow) = network_to_wire(&network);
            let spec = agent::ActionSpec { network: kind.into(), network_allow, ..Default::default() };
            assert_eq!(network_from_wire(&spec), Ok(network));
        }
        for network in [0, 77] {
            let spec = agent::ActionSpec { network, ..Default::default() };
            assert_eq!(network_from_wire(&spec), Ok(Network::Off));
        }
        let network = agent::Network::Allow.into();
        let spec = agent::ActionSpec { network, network_allow: vec!["a b".into()], ..Default::default() };
        assert!(network_from_wire(&spec).is_err());
    }
}
