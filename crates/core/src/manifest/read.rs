//! Reads a tree as a pipeline, and goes on after each error: what could not be read gets a default, since with any
//! complaint there will be no plan.

use std::collections::BTreeMap;
use std::time::Duration;

use super::error::{Complaints, ManifestErrorKind};
use super::keys;
use super::reader::{Reader, find};
use super::source::{Span, quoted};
use super::tree::{Content, Entry, Node};
use super::values::{self, Refusal};
use super::{MAX_ACTIONS, MAX_COMMANDS, MAX_ENV_BYTES, MAX_VARIABLES};
use crate::plan::{
    AllowFailure, Artifacts, Cache, Environment, Plan, PlannedAction, Reports, Retry, Service, Shell,
};

/// How long an action may take that says nothing about it.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60 * 60);

/// A pipeline whose needs are still names.
pub(super) struct Draft<'n> {
    name: String,
    env: BTreeMap<String, String>,
    pub(super) actions: Vec<DraftAction<'n>>,
}

/// An action whose needs are still names.
pub(super) struct DraftAction<'n> {
    pub(super) name: &'n str,
    pub(super) name_span: Span,
    pub(super) needs: Needs<'n>,
    /// Names of the actions whose artifacts it wants.
    pub(super) uses: Vec<(&'n str, Span)>,
    body: Body,
}

/// What an action says about its order.
pub(super) enum Needs<'n> {
    /// Nothing, so it comes after the action before it.
    Previous,
    /// Something that was complained about.
    Unreadable,
    Listed(Vec<(&'n str, Span)>),
}

/// What an action does.
#[derive(Default)]
struct Body {
    commands: Vec<String>,
    shell: Shell,
    env: BTreeMap<String, String>,
    environment: Option<Environment>,
    timeout: Option<Duration>,
    allow_failure: AllowFailure,
    retry: Retry,
    exclusive: bool,
    services: Vec<Service>,
    caches: Vec<Cache>,
    artifacts: Option<Artifacts>,
    reports: Reports,
}

impl DraftAction<'_> {
    /// Whether it keeps any files for others.
    pub(super) fn has_artifacts(&self) -> bool {
        self.body.artifacts.is_some()
    }
}

impl Draft<'_> {
    /// The plan, with what each action needs and uses.
    pub(super) fn into_plan(self, needs: Vec<Vec<usize>>, uses: Vec<Vec<usize>>) -> Plan {
        let Self { name, env, actions } = self;
        let planned = |((action, needs), uses): ((DraftAction<'_>, Vec<usize>), Vec<usize>)| {
            let Body {
                commands,
                shell,
                env: own,
                environment,
                timeout,
                allow_failure,
                retry,
                exclusive,
                services,
                caches,
                artifacts,
                reports,
            } = action.body;
            let mut env = env.clone();
            env.extend(own);
            PlannedAction {
                name: action.name.to_owned(),
                needs,
                commands,
                shell,
                env,
                environment: environment.unwrap_or_default(),
                timeout: timeout.unwrap_or(DEFAULT_TIMEOUT),
                allow_failure,
                retry,
                exclusive,
                uses,
                services,
                caches,
                artifacts,
                reports,
            }
        };
        Plan { name, actions: actions.into_iter().zip(needs).zip(uses).map(planned).collect() }
    }
}

/// Reads the whole manifest. None where not even the actions' names could be read, so that their order means nothing.
pub(super) fn pipeline<'n>(
    root: &'n Node<'_>,
    source: &str,
    complaints: &mut Complaints,
) -> Option<Draft<'n>> {
    let mut reader = Reader { source, complaints };
    let Content::Mapping(entries) = &root.content else {
        let message =
            format!("a manifest is a mapping with `name` and `actions`; {}", root.content.describe());
        reader.complain(ManifestErrorKind::Shape, root.span, message, "begin with `name: …`");
        return None;
    };
    let beginning = entries.first().map_or(root.span, |entry| entry.key_span);
    let fields = reader.fields(entries, &keys::PIPELINE);
    let name = match find(fields, "name") {
        Some(entry) => reader.pipeline_name(entry),
        None if is_misspelt(fields, "name", &keys::PIPELINE) => None,
        None => {
            let mend = "say what it is called: `name: my pipeline`";
            reader.complain(ManifestErrorKind::Missing, beginning, "the pipeline has no `name`", mend);
            None
        }
    };
    let env = find(fields, "env").map(|entry| reader.env(entry)).unwrap_or_default();
    let actions = match find(fields, "actions") {
        Some(entry) => reader.actions(entry),
        None if is_misspelt(fields, "actions", &keys::PIPELINE) => None,
        None => {
            let mend = "add `actions:` with at least one action and its `commands`";
            reader.complain(ManifestErrorKind::Missing, beginning, "the pipeline has no `actions`", mend);
            None
        }
    };
    Some(Draft { name: name.unwrap_or_default(), env, actions: actions? })
}

impl Reader<'_> {
    fn pipeline_name(&mut self, entry: &Entry<'_>) -> Option<String> {
        let text = self.text(entry, "a text")?;
        self.taken(entry.value.span, values::name(text))?;
        Some(text.to_owned())
    }

    pub(super) fn env(&mut self, entry: &Entry<'_>) -> BTreeMap<String, String> {
        let Some(entries) = self.mapping(entry, "a mapping of variables to texts") else {
            return BTreeMap::new();
        };
        if let Some(over) = entries.get(MAX_VARIABLES) {
            let message = format!("{} variables, at most {MAX_VARIABLES} are taken", entries.len());
            self.complain(ManifestErrorKind::Limit, over.key_span, message, "set the others in a script");
            return BTreeMap::new();
        }
        let mut env = BTreeMap::new();
        let mut size_bytes = 0;
        for variable in entries {
            let (name, span) = (&variable.key, variable.key_span);
            if values::is_reserved_variable(name) {
                let message = format!("{} is set by SealCI itself", quoted(name));
                self.complain(ManifestErrorKind::Reserved, span, message, "choose another name");
                continue;
            }
            let named = self.taken(span, values::variable_name(name));
            let value = self.text(variable, "a text (`\"\"` for an empty one)");
            if let (Some(()), Some(value)) = (named, value) {
                size_bytes += name.len() + value.len();
                env.insert(name.clone().into_owned(), value.to_owned());
            }
        }
        if size_bytes > MAX_ENV_BYTES {
            let message = format!("`env` has {size_bytes} bytes, at most {MAX_ENV_BYTES} (32 KiB) are taken");
            let mend = "keep large values in files of the repository";
            self.complain(ManifestErrorKind::Limit, entry.key_span, message, mend);
        }
        env
    }

    fn actions<'n>(&mut self, entry: &'n Entry<'_>) -> Option<Vec<DraftAction<'n>>> {
        let entries = self.mapping(entry, "a mapping of names to actions")?;
        if let Some(over) = entries.get(MAX_ACTIONS) {
            let message = format!("{} actions, at most {MAX_ACTIONS} are taken", entries.len());
            let mend = "put several commands into one action, or split the manifest";
            self.complain(ManifestErrorKind::Limit, over.key_span, message, mend);
            return None;
        }
        if entries.is_empty() {
            let mend = "add one, with its `commands`";
            self.complain(ManifestErrorKind::Missing, entry.value.span, "there is no action", mend);
        }
        Some(entries.iter().map(|entry| self.action(entry)).collect())
    }

    fn action<'n>(&mut self, entry: &'n Entry<'_>) -> DraftAction<'n> {
        let (name, name_span): (&'n str, _) = (&entry.key, entry.key_span);
        self.taken(name_span, values::name(name));
        let Some(entries) = self.mapping(entry, "a mapping with `commands`") else {
            return DraftAction {
                name,
                name_span,
                needs: Needs::Unreadable,
                uses: Vec::new(),
                body: Body::default(),
            };
        };
        let fields = self.fields(entries, &keys::ACTION);
        let needs = find(fields, "needs").map_or(Needs::Previous, |entry| self.needs(entry));
        let commands = match find(fields, "commands") {
            Some(entry) => self.commands(entry),
            None if is_misspelt(fields, "commands", &keys::ACTION) => Vec::new(),
            None => {
                let message = format!("the action {} has no `commands`", quoted(name));
                let mend = "say what it runs: `commands: [make test]`";
                self.complain(ManifestErrorKind::Missing, name_span, message, mend);
                Vec::new()
            }
        };
        let environment = find(fields, "configuration").and_then(|entry| self.configuration(entry));
        let executor = environment.as_ref().and_then(|environment| environment.executor);
        let body = Body {
            commands,
            shell: find(fields, "shell").and_then(|entry| self.shell(entry)).unwrap_or_default(),
            env: find(fields, "env").map(|entry| self.env(entry)).unwrap_or_default(),
            environment,
            timeout: find(fields, "timeout")
                .and_then(|entry| self.parsed(entry, "a duration (`20m`)", values::timeout)),
            allow_failure: find(fields, "allow-failure")
                .and_then(|entry| self.allow_failure(entry))
                .unwrap_or_default(),
            retry: find(fields, "retry").and_then(|entry| self.retry(entry)).unwrap_or_default(),
            exclusive: find(fields, "exclusive").and_then(|entry| self.exclusive(entry)).unwrap_or_default(),
            services: find(fields, "services")
                .map(|entry| self.services(entry, executor))
                .unwrap_or_default(),
            caches: find(fields, "cache").map(|entry| self.caches(entry)).unwrap_or_default(),
            artifacts: find(fields, "artifacts").and_then(|entry| self.artifacts(entry)),
            reports: find(fields, "reports").map(|entry| self.reports(entry)).unwrap_or_default(),
        };
        let uses = find(fields, "uses").map(|entry| self.names(entry)).unwrap_or_default();
        DraftAction { name, name_span, needs, uses, body }
    }

    fn needs<'n>(&mut self, entry: &'n Entry<'_>) -> Needs<'n> {
        let before = self.complaints.len();
        let names = self.names(entry);
        let is_list = matches!(entry.value.content, Content::Sequence(_));
        if is_list || self.complaints.len() == before { Needs::Listed(names) } else { Needs::Unreadable }
    }

    /// The names of actions in a list.
    fn names<'n>(&mut self, entry: &'n Entry<'_>) -> Vec<(&'n str, Span)> {
        let key = quoted(&entry.key);
        let wanted = match (&entry.value.content, &*entry.key) {
            (Content::Text(name), _) => {
                format!("a list: `{}: [{}]`", key.trim_matches('`'), quoted(name).trim_matches('`'))
            }
            (_, "needs") => "a list of actions (`[]` to start at once)".to_owned(),
            _ => "a list of actions".to_owned(),
        };
        let Some(items) = self.list(entry, &wanted) else { return Vec::new() };
        let mut names = Vec::with_capacity(items.len());
        for item in items {
            match &item.content {
                Content::Text(name) => {
                    names.extend(self.plain(name, item.span).map(|name| (name, item.span)))
                }
                Content::Refused => {}
                content => {
                    let message = format!("{key} lists names of actions; {}", content.describe());
                    self.complain(ManifestErrorKind::Shape, item.span, message, "write the action's name");
                }
            }
        }
        names
    }

    fn commands(&mut self, entry: &Entry<'_>) -> Vec<String> {
        let wanted = match &entry.value.content {
            Content::Text(_) => "a list: put `- ` before each command",
            _ => "a list of commands",
        };
        let Some(items) = self.list(entry, wanted) else { return Vec::new() };
        if items.is_empty() {
            let mend = "add a command";
            self.complain(ManifestErrorKind::Missing, entry.value.span, "`commands` is empty", mend);
        }
        if let Some(over) = items.get(MAX_COMMANDS) {
            let message = format!("{} commands, at most {MAX_COMMANDS} are taken", items.len());
            let mend = "put them into a script of the repository";
            self.complain(ManifestErrorKind::Limit, over.span, message, mend);
            return Vec::new();
        }
        items.iter().filter_map(|item| self.command(item)).collect()
    }

    fn command(&mut self, item: &Node<'_>) -> Option<String> {
        match &item.content {
            Content::Text(text) if text.trim().is_empty() => {
                self.complain(ManifestErrorKind::Missing, item.span, "the command is empty", "remove it");
            }
            Content::Text(text) => return self.plain(text, item.span).map(str::to_owned),
            Content::Refused => {}
            Content::Nothing => {
                self.complain(
                    ManifestErrorKind::Missing,
                    item.span,
                    "the command is empty",
                    "remove the `-`",
                );
            }
            Content::Mapping(entries) => {
                if let Some(command) = command_with_colon(item.span, entries, self.source) {
                    return self.plain(command, item.span).map(str::to_owned);
                }
                let message = "a command is a text; this is a mapping";
                let mend = "quote the command: YAML sees a mapping where a text has `: ` or begins with `{`";
                self.complain(ManifestErrorKind::Shape, item.span, message, mend);
            }
            Content::Sequence(_) => {
                let message = "a command is a text; this is a list";
                let mend = "write one line for the shell; quote it if it begins with `[` or `- `";
                self.complain(ManifestErrorKind::Shape, item.span, message, mend);
            }
        }
        None
    }

    fn shell(&mut self, entry: &Entry<'_>) -> Option<Shell> {
        self.parsed(entry, "`sh` or `bash`", |text| {
            Shell::parse(text).ok_or_else(|| {
                Refusal::new(format!("no shell is called {}", quoted(text)), "write `sh` or `bash`")
            })
        })
    }

    fn allow_failure(&mut self, entry: &Entry<'_>) -> Option<AllowFailure> {
        let wanted = "`true`, `false` or a list of exit codes";
        let Content::Sequence(items) = &entry.value.content else {
            return self.parsed(entry, wanted, |text| match text {
                "true" => Ok(AllowFailure::Always),
                "false" => Ok(AllowFailure::Never),
                _ => {
                    let mend = match values::exit_code(text) {
                        Ok(code) => format!("write exit codes as a list: `[{code}]`"),
                        Err(_) => format!("write {wanted}"),
                    };
                    Err(Refusal::new(format!("{} is neither yes nor no", quoted(text)), mend))
                }
            });
        };
        if items.is_empty() {
            let message = "`allow-failure` lists no exit code";
            self.complain(ManifestErrorKind::Missing, entry.value.span, message, format!("write {wanted}"));
        }
        let mut codes = Vec::new();
        for item in items {
            let Content::Text(text) = &item.content else {
                if !matches!(item.content, Content::Refused) {
                    let message = format!("`allow-failure` lists exit codes; {}", item.content.describe());
                    self.complain(
                        ManifestErrorKind::Shape,
                        item.span,
                        message,
                        "write a number from 1 to 255",
                    );
                }
                continue;
            };
            let Some(text) = self.plain(text, item.span) else { continue };
            let code = values::exit_code(text);
            let Some(code) = self.taken(item.span, code) else {
                continue;
            };
            if codes.contains(&code) {
                let message = format!("the exit code {code} is there twice");
                self.complain(ManifestErrorKind::Duplicate, item.span, message, "name it once");
            } else {
                codes.push(code);
            }
        }
        Some(AllowFailure::ExitCodes(codes))
    }
}

/// Whether a key that was refused was meant as this one, so that its absence is no second error.
fn is_misspelt(fields: &[Entry<'_>], key: &str, section: &keys::Section) -> bool {
    fields.iter().take(64).any(|entry| keys::meant(&entry.key, section) == Some(key))
}

/// What was written where YAML sees a mapping of one key, on one line and without braces: a command with a `: ` in it,
/// or with a `:` at its end. Nothing else can be meant by it.
fn command_with_colon<'s>(mapping: Span, entries: &[Entry<'_>], source: &'s str) -> Option<&'s str> {
    let [entry] = entries else { return None };
    let end = match &entry.value.content {
        Content::Text(_) => entry.value.span.end,
        Content::Nothing => entry.key_span.end + source.get(entry.key_span.end..)?.find(':')? + 1,
        _ => return None,
    };
    let command = source.get(entry.key_span.start..end)?.trim_end();
    (mapping.start == entry.key_span.start && !command.contains(['\n', '\r'])).then_some(command)
}
