//! Reads what an action asks of the machine that runs it: its `configuration`.

use std::collections::BTreeMap;

use super::MAX_LABELS;
use super::error::ManifestErrorKind;
use super::keys;
use super::reader::{Reader, find};
use super::source::quoted;
use super::tree::{Content, Entry};
use super::values::{self, Refusal};
use crate::destination::{Destination, InvalidDestination};
use crate::plan::{Container, Entrypoint, Environment, ExecutorKind, Network, Pull, Resources};

impl Reader<'_> {
    pub(super) fn configuration(&mut self, entry: &Entry<'_>) -> Option<Environment> {
        let entries = self.mapping(entry, "a mapping")?;
        let fields = self.fields(entries, &keys::CONFIGURATION);
        let container = find(fields, "container").and_then(|entry| self.container(entry));
        let executor = find(fields, "executor").and_then(|entry| self.executor(entry, container.is_some()));
        Some(Environment {
            container,
            labels: find(fields, "labels").map(|entry| self.labels(entry)).unwrap_or_default(),
            resources: find(fields, "resources").map_or(Resources::DEFAULT, |entry| self.resources(entry)),
            network: find(fields, "network")
                .and_then(|entry| self.network(entry, executor))
                .unwrap_or_default(),
            executor,
        })
    }

    /// An image by its name, or with what is said about it.
    pub(super) fn container(&mut self, entry: &Entry<'_>) -> Option<Container> {
        let image = |text: &str| values::image(text).map(|()| text.to_owned());
        let Content::Mapping(entries) = &entry.value.content else {
            return self.parsed(entry, "an image (`debian:bookworm`)", image).map(Container::of);
        };
        let fields = self.fields(entries, &keys::CONTAINER);
        let pull = find(fields, "pull").and_then(|entry| self.pull(entry)).unwrap_or_default();
        let entrypoint =
            find(fields, "entrypoint").and_then(|entry| self.entrypoint(entry)).unwrap_or_default();
        let user = find(fields, "user").and_then(|entry| {
            self.parsed(entry, "a user (`1000`, `build:build`)", |text| {
                values::user(text).map(|()| text.to_owned())
            })
        });
        let Some(entry) = find(fields, "image") else {
            let mend = "write `container: debian:bookworm`, or add `image`";
            self.complain(ManifestErrorKind::Missing, entry.key_span, "`container` names no `image`", mend);
            return None;
        };
        let image = self.parsed(entry, "an image (`debian:bookworm`)", image)?;
        Some(Container { image, pull, entrypoint, user })
    }

    fn pull(&mut self, entry: &Entry<'_>) -> Option<Pull> {
        self.one_of(entry, &Pull::ALL.map(|pull| (pull.as_str(), pull)))
    }

    fn entrypoint(&mut self, entry: &Entry<'_>) -> Option<Entrypoint> {
        let wanted = "a list of words, or `image` for the image's own";
        match &entry.value.content {
            Content::Sequence(_) => self.words(entry, wanted).map(Entrypoint::Words),
            _ => self.parsed(entry, wanted, |text| match text {
                "image" => Ok(Entrypoint::Image),
                _ => {
                    let message = format!("{} is neither a list nor `image`", quoted(text));
                    Err(Refusal::new(message, format!("write {wanted}")))
                }
            }),
        }
    }

    fn executor(&mut self, entry: &Entry<'_>, has_image: bool) -> Option<ExecutorKind> {
        let names = ExecutorKind::ALL.map(ExecutorKind::as_str);
        let executor = self.parsed(entry, "the name of an executor", |text| {
            ExecutorKind::parse(text).ok_or_else(|| {
                let mend = match keys::nearest(text, names.into_iter()) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("write one of {}", names.join(", ")),
                };
                Refusal::new(format!("no executor is called {}", quoted(text)), mend)
            })
        })?;
        if has_image && matches!(executor, ExecutorKind::Process | ExecutorKind::Sandbox) {
            let message = format!(
                "the executor `{}` runs without an image, but `container` names one",
                executor.as_str()
            );
            let mend = "remove one of the two";
            self.complain(ManifestErrorKind::Value, entry.value.span, message, mend);
        }
        Some(executor)
    }

    fn labels(&mut self, entry: &Entry<'_>) -> BTreeMap<String, String> {
        let Some(entries) = self.mapping(entry, "a mapping of labels to texts") else {
            return BTreeMap::new();
        };
        if let Some(over) = entries.get(MAX_LABELS) {
            let message = format!("{} labels, at most {MAX_LABELS} are taken", entries.len());
            self.complain(ManifestErrorKind::Limit, over.key_span, message, "remove some");
            return BTreeMap::new();
        }
        let mut labels = BTreeMap::new();
        for label in entries {
            let name = &label.key;
            let named = self.taken(label.key_span, values::label_name(name));
            let value = self.parsed(label, "a text", |text| values::label_value(text).map(|()| text));
            if let (Some(()), Some(value)) = (named, value) {
                labels.insert(name.clone().into_owned(), value.to_owned());
            }
        }
        labels
    }

    fn resources(&mut self, entry: &Entry<'_>) -> Resources {
        let Some(entries) = self.mapping(entry, "a mapping with `cpu` and `memory`") else {
            return Resources::DEFAULT;
        };
        let fields = self.fields(entries, &keys::RESOURCES);
        let cpu = find(fields, "cpu")
            .and_then(|entry| self.parsed(entry, "a number of CPUs (`1`, `500m`)", values::cpu_millis));
        let memory = find(fields, "memory")
            .and_then(|entry| self.parsed(entry, "an amount of memory (`2GiB`)", values::memory_bytes));
        Resources {
            cpu_millis: cpu.unwrap_or(Resources::DEFAULT.cpu_millis),
            memory_bytes: memory.unwrap_or(Resources::DEFAULT.memory_bytes),
        }
    }

    /// `executor` is the action's, if it names one.
    fn network(&mut self, entry: &Entry<'_>, executor: Option<ExecutorKind>) -> Option<Network> {
        if let Content::Mapping(entries) = &entry.value.content {
            let allow = find(self.fields(entries, &keys::NETWORK), "allow");
            let network = allow.and_then(|allow| self.allow(allow));
            if allow.is_none() && entries.is_empty() {
                let mend = "write `network: {allow: [packages.example.org]}`, `on` or `off`";
                self.complain(ManifestErrorKind::Missing, entry.key_span, "`network` allows nothing", mend);
            }
            if let Some(kind @ (ExecutorKind::Process | ExecutorKind::Docker)) = executor {
                let kind = kind.as_str();
                let message = format!("the executor `{kind}` cannot hold an action to what `network` allows");
                let mend = "name `sandbox`, `container` or `microvm`, or leave the executor out";
                self.complain(ManifestErrorKind::Value, entry.value.span, message, mend);
            }
            return network;
        }
        self.parsed(entry, "`on`, `off` or `{allow: […]}`", |text| match text {
            "on" => Ok(Network::On),
            "off" => Ok(Network::Off),
            _ => {
                let message = format!("{} is neither on nor off", quoted(text));
                Err(Refusal::new(message, "write `on`, `off`, or `{allow: [packages.example.org]}`"))
            }
        })
    }

    fn allow(&mut self, entry: &Entry<'_>) -> Option<Network> {
        let wanted = "a list of hosts and ports (`[\"packages.example.org:443\"]`)";
        let destinations = self.items(entry, wanted, |text| {
            Destination::parse(text).map_err(|InvalidDestination { message, mend }| {
                Refusal::new(format!("{} {message}", quoted(text)), mend)
            })
        })?;
        if matches!(&entry.value.content, Content::Sequence(items) if items.is_empty()) {
            let mend = "name what is reached, or write `network: off`";
            self.complain(ManifestErrorKind::Missing, entry.value.span, "`allow` allows nothing", mend);
        }
        Some(Network::Allow(destinations))
    }
}
