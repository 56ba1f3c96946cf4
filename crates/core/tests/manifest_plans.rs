//! What manifests become: the language that is offered, as plans.

use std::collections::BTreeMap;
use std::time::Duration;

use sealci_core::destination::Destination;
use sealci_core::manifest::{ManifestSource, parse};
use sealci_core::plan::{
    AllowFailure, Container, Entrypoint, ExecutorKind, Network, Plan, Pull, Ready, Resources, Retry, RetryOn,
    Shell, When,
};

fn plan(text: impl AsRef<[u8]>) -> Plan {
    match parse(&ManifestSource { name: ".sealci/pipeline.yaml", text: text.as_ref() }) {
        Ok(plan) => plan,
        Err(errors) => panic!("{errors}"),
    }
}

fn needs(text: &str) -> Vec<Vec<usize>> {
    plan(text).actions.into_iter().map(|action| action.needs).collect()
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn the_first_format_keeps_working() {
    let plan = plan(
        r#"name: hello
actions:
  build:
    configuration:
      container: debian:bookworm     # without it: the agent's default executor (sandbox)
    commands:
      - cat /etc/os-release
      - test "$(id -u)" = 0
  test:
    commands:
      - echo "an action has its own tree: files pass only as artifacts"
"#,
    );
    assert_eq!(plan.name, "hello");
    let [build, test] = plan.actions.as_slice() else { panic!("{plan:?}") };
    assert_eq!((build.name.as_str(), test.name.as_str()), ("build", "test"));
    assert_eq!(build.environment.container, Some(Container::of("debian:bookworm")));
    assert_eq!(build.environment.required_executor(), Some(ExecutorKind::Container));
    assert_eq!(build.commands, ["cat /etc/os-release", "test \"$(id -u)\" = 0"]);
    assert_eq!(test.commands, ["echo \"an action has its own tree: files pass only as artifacts\""]);
    assert_eq!((build.needs.as_slice(), test.needs.as_slice()), (&[][..], &[0][..]));
    assert_eq!(test.timeout, Duration::from_secs(3600));
    assert_eq!(test.environment.resources, Resources::DEFAULT);
    assert_eq!(test.environment.network, Network::On);
    assert_eq!((test.shell, &test.allow_failure), (Shell::Sh, &AllowFailure::Never));
}

#[test]
fn everything_that_is_offered_arrives_in_the_plan() {
    let plan = plan(
        r#"
name: everything (that is offered)
env: {RUST_BACKTRACE: "1", LEVEL: pipeline}
actions:
  test:
    needs: []
    configuration:
      container: {image: "rust:1.90"}
      executor: docker
      labels: {arch: x86_64, gpu: true}
      resources: {cpu: 500m, memory: 1.5GiB}
      network: off
    env: {LEVEL: action}
    commands: [cargo test, "echo done"]
    shell: bash
    timeout: 1h30m
    retry: {times: 2, on: [timed_out, failed]}
    exclusive: true
    allow-failure: [1, 77]
"#,
    );
    let action = &plan.actions[0];
    assert_eq!(action.env, map(&[("LEVEL", "action"), ("RUST_BACKTRACE", "1")]));
    assert_eq!(action.environment.container, Some(Container::of("rust:1.90")));
    assert_eq!(action.environment.executor, Some(ExecutorKind::Docker));
    assert_eq!(action.environment.labels, map(&[("arch", "x86_64"), ("gpu", "true")]));
    assert_eq!(action.environment.resources, Resources { cpu_millis: 500, memory_bytes: 3 << 29 });
    assert_eq!(action.environment.network, Network::Off);
    assert_eq!(action.commands, ["cargo test", "echo done"]);
    assert_eq!(action.shell, Shell::Bash);
    assert_eq!(action.timeout, Duration::from_secs(5400));
    assert_eq!(action.allow_failure, AllowFailure::ExitCodes(vec![1, 77]));
    assert_eq!(action.retry, Retry { times: 2, on: vec![RetryOn::TimedOut, RetryOn::Failed] });
    assert!(action.exclusive);
}

#[test]
fn a_retry_that_names_no_ends_is_after_failures_and_errors() {
    let plan = plan("name: n\nactions: {a: {commands: [x], retry: {times: 1}}, b: {commands: [x]}}");
    assert_eq!(plan.actions[0].retry, Retry { times: 1, on: vec![RetryOn::Failed, RetryOn::Errored] });
    assert_eq!(plan.actions[1].retry, Retry::default());
}

#[test]
fn images_services_and_files_arrive_in_the_plan() {
    let plan = plan(
        r#"
name: files
actions:
  build:
    configuration:
      container: {image: "rust:1.90", pull: always, entrypoint: [env, A=1], user: "1000:build"}
    services:
      db:
        container: "postgres:16"
        command: [postgres, -c, fsync=off]
        env: {POSTGRES_PASSWORD: x}
        ready: {command: pg_isready, timeout: 30s}
      queue: {container: {image: redis, entrypoint: []}, ready: {command: redis-cli ping}}
      plain: {container: {image: x, entrypoint: image, pull: never}}
    cache:
      - {key: "cargo-${{ hash('Cargo.lock') }}", restore: ["cargo-"], paths: [~/.cargo, target]}
    commands: [cargo test]
    artifacts: {paths: [target/release/sealci, "!**/*.d"], when: always, keep: 30d}
    reports: {junit: ["target/nextest/**/junit.xml"]}
  between: {commands: [x]}
  deploy:
    uses: [build]
    artifacts: {paths: [x]}
    commands: [ls .sealci/artifacts/build]
"#,
    );
    let [build, between, deploy] = plan.actions.as_slice() else { panic!("{plan:?}") };
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let container = build.environment.container.as_ref().unwrap();
    let expected = Container {
        image: "rust:1.90".into(),
        pull: Pull::Always,
        entrypoint: Entrypoint::Words(words(&["env", "A=1"])),
        user: Some("1000:build".into()),
    };
    assert_eq!(container, &expected);
    let [db, queue, plain] = build.services.as_slice() else { panic!("{build:?}") };
    assert_eq!((db.name.as_str(), &db.container), ("db", &Container::of("postgres:16")));
    assert_eq!(db.command, Some(words(&["postgres", "-c", "fsync=off"])));
    assert_eq!(db.env, map(&[("POSTGRES_PASSWORD", "x")]));
    let ready =
        |command: &str, seconds| Ready { command: command.into(), timeout: Duration::from_secs(seconds) };
    assert_eq!(db.ready, Some(ready("pg_isready", 30)));
    assert_eq!(queue.container.entrypoint, Entrypoint::Words(Vec::new()));
    assert_eq!(queue.ready, Some(ready("redis-cli ping", 60)));
    assert_eq!((&plain.container.entrypoint, plain.container.pull), (&Entrypoint::Image, Pull::Never));
    assert_eq!((&plain.command, &plain.ready), (&None, &None));
    let [cache] = build.caches.as_slice() else { panic!("{build:?}") };
    assert_eq!(cache.key.as_str(), "cargo-${{ hash('Cargo.lock') }}");
    assert_eq!(cache.restore.iter().map(ToString::to_string).collect::<Vec<_>>(), ["cargo-"]);
    assert_eq!(cache.paths, ["~/.cargo", "target"]);
    let artifacts = build.artifacts.as_ref().unwrap();
    assert_eq!(artifacts.paths, ["target/release/sealci", "!**/*.d"]);
    assert_eq!((artifacts.when, artifacts.keep), (When::Always, Some(Duration::from_secs(30 * 86_400))));
    assert_eq!(build.reports.junit, ["target/nextest/**/junit.xml"]);
    assert!(build.uses_storage() && !between.uses_storage() && deploy.uses_storage());
    assert_eq!(deploy.uses, [0]);
    let deploys = deploy.artifacts.as_ref().unwrap();
    assert_eq!((deploys.when, deploys.keep), (When::Succeeded, None));
    let stored = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&stored).unwrap(), plan);
}

#[test]
fn text_is_text() {
    let plan = plan(
        r#"
name: 1.10
env:
  A: no
  B: 1.10
  C: 0123
  D: ~
  E: true
  F: null
  G: 2026-11-05
  H: 0x1F
  I: .inf
  J: ""
  K: "a\tb"
  L: |
    two
    lines
  M: >-
    one
    line
  N: 1_000
  O: 'it''s'
actions:
  no:
    configuration: {labels: {a: yes, b: 1e3}}
    commands: [true, 0123, ~, "null", no]
  "2":
    needs: [no]
    commands: [x]
"#,
    );
    assert_eq!(plan.name, "1.10");
    let expected = [
        ("A", "no"),
        ("B", "1.10"),
        ("C", "0123"),
        ("D", "~"),
        ("E", "true"),
        ("F", "null"),
        ("G", "2026-11-05"),
        ("H", "0x1F"),
        ("I", ".inf"),
        ("J", ""),
        ("K", "a\tb"),
        ("L", "two\nlines\n"),
        ("M", "one line"),
        ("N", "1_000"),
        ("O", "it's"),
    ];
    assert_eq!(plan.actions[0].env, map(&expected));
    assert_eq!(plan.actions[0].name, "no");
    assert_eq!(plan.actions[0].environment.labels, map(&[("a", "yes"), ("b", "1e3")]));
    assert_eq!(plan.actions[0].commands, ["true", "0123", "~", "null", "no"]);
    assert_eq!(plan.actions[1].needs, [0]);
}

#[test]
fn a_command_keeps_its_colons() {
    let plan = plan(
        r#"
name: n
actions:
  a:
    commands:
      - echo "so: be it"      # not this
      - curl -H 'Accept: text/plain' http://localhost
      - make all:
      - "quoted": 'value'
      - key:   spaced
      - 'whole: quoted'
      - docker run a:b
"#,
    );
    let expected = [
        r#"echo "so: be it""#,
        "curl -H 'Accept: text/plain' http://localhost",
        "make all:",
        r#""quoted": 'value'"#,
        "key:   spaced",
        "whole: quoted",
        "docker run a:b",
    ];
    assert_eq!(plan.actions[0].commands, expected);
}

#[test]
fn switches_are_read_as_they_are_written() {
    for (text, allowed) in [
        ("true", AllowFailure::Always),
        ("'true'", AllowFailure::Always),
        ("false", AllowFailure::Never),
        ("[3]", AllowFailure::ExitCodes(vec![3])),
        ("\n    - 3\n    - '4'", AllowFailure::ExitCodes(vec![3, 4])),
    ] {
        let plan = plan(format!("name: n\nactions:\n a:\n  commands: [x]\n  allow-failure: {text}\n"));
        assert_eq!(plan.actions[0].allow_failure, allowed, "{text}");
    }
    let allowed =
        ["*.example.org", "10.1.0.0/16:5432"].map(|text| Destination::parse(text).unwrap()).to_vec();
    for (text, network) in [
        ("on", Network::On),
        ("off", Network::Off),
        ("\"off\"", Network::Off),
        ("{allow: [\"*.Example.org\", \"10.1.0.0/16:5432\"]}", Network::Allow(allowed)),
    ] {
        let plan =
            plan(format!("name: n\nactions:\n a:\n  commands: [x]\n  configuration: {{network: {text}}}\n"));
        assert_eq!(plan.actions[0].environment.network, network, "{text}");
    }
}

#[test]
fn order_follows_the_text_unless_needs_say_otherwise() {
    let text = "
name: order
actions:
  zebra: {commands: [x]}
  apple: {commands: [x]}
  free: {commands: [x], needs: []}
  after free: {commands: [x]}
  last: {commands: [x], needs: [after free, zebra, apple]}
  forward: {commands: [x], needs: [later]}
  later: {commands: [x], needs: [zebra]}
";
    assert_eq!(needs(text), [vec![], vec![0], vec![], vec![2], vec![0, 1, 3], vec![6], vec![0]]);
}

#[test]
fn marks_line_ends_and_comments_do_not_matter() {
    let text = "# a comment\n---\nname: n\nactions:\n  a:\n    commands:\n    - one\n    - |\n      two\n      three\n...\n";
    let expected = plan(text);
    assert_eq!(expected.actions[0].commands, ["one", "two\nthree\n"]);
    assert_eq!(plan(format!("\u{FEFF}{text}")), expected, "byte-order mark");
    assert_eq!(plan(text.replace('\n', "\r\n")), expected, "CRLF");
    assert_eq!(plan(text.replace('\n', "\r")), expected, "CR");
}

#[test]
fn the_limits_themselves_are_allowed() {
    use std::fmt::Write as _;
    let mut text = format!("name: {}\nactions:\n", "n".repeat(128));
    for action in 0..512 {
        write!(text, "  {action}{}:\n    commands: [x]\n", "a".repeat(100)).unwrap();
    }
    assert_eq!(plan(&text).actions.len(), 512);

    let mut text = "name: n\nactions:\n  a:\n    timeout: 7d\n    commands:\n".to_owned();
    (0..1000).for_each(|command| writeln!(text, "    - echo {command}").unwrap());
    assert_eq!(plan(&text).actions[0].commands.len(), 1000);

    let value = "v".repeat(30 << 10);
    assert_eq!(
        plan(format!("name: n\nenv: {{A: {value}}}\nactions: {{a: {{commands: [x]}}}}")).actions[0].env["A"],
        value
    );
}

#[test]
fn a_plan_is_the_same_after_a_round_through_json() {
    let plan =
        plan("name: n\nactions: {a: {commands: [x], shell: bash, allow-failure: [1]}, b: {commands: [y]}}");
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
}
