//! What is refused, where, and with which advice.

#![allow(clippy::unwrap_used)] // also in what tests share

use sealci_core::manifest::{ManifestErrorKind as Kind, ManifestErrors, ManifestSource, parse};

fn errors(text: impl AsRef<[u8]>) -> ManifestErrors {
    match parse(&ManifestSource { name: "ci.yaml", text: text.as_ref() }) {
        Ok(plan) => panic!("accepted:\n{}\n{plan:?}", String::from_utf8_lossy(text.as_ref())),
        Err(errors) => errors,
    }
}

/// A manifest whose only action has these lines, each beginning at column 5; the first is line 4.
fn action(lines: &str) -> String {
    let lines: String = lines.lines().map(|line| format!("    {line}\n")).collect();
    format!("name: n\nactions:\n  a:\n{lines}    commands: [x]\n")
}

/// Exactly one error: kind, line, column, a part of the message, a part of the mend.
type Bad = (String, Kind, usize, usize, &'static str, &'static str);

fn assert_each(table: &[Bad]) {
    for (text, kind, line, column, message, mend) in table {
        let errors = errors(text);
        let [error] = errors.errors() else { panic!("{text}\n{errors}") };
        assert_eq!((error.kind, error.line, error.column), (*kind, *line, *column), "{text}\n{errors}");
        assert!(error.message.contains(message), "{text}\n{errors}\nwants: {message}");
        assert!(error.mend.contains(mend), "{text}\n{errors}\nwants: {mend}");
    }
}

#[test]
fn keys_that_are_wrong_or_to_come() {
    let a = action;
    assert_each(&[
        (a("comand: []"), Kind::UnknownKey, 4, 5, "`comand` is no key of an action", "`commands`?"),
        (a("timeouts: 3m"), Kind::UnknownKey, 4, 5, "`timeouts`", "did you mean `timeout`?"),
        (a("container: x"), Kind::UnknownKey, 4, 5, "`container`", "belongs in `configuration`"),
        (a("steps: []"), Kind::UnknownKey, 4, 5, "`steps`", "did you mean `commands`?"),
        (a("frobnicate: 1"), Kind::UnknownKey, 4, 5, "`frobnicate`", "an action takes `needs`"),
        (a("<<: {}"), Kind::UnknownKey, 4, 5, "`<<`", "no merge keys"),
        (a("configuration: {lables: {}}"), Kind::UnknownKey, 4, 21, "`lables`", "`labels`?"),
        (a("configuration: {network: {alow: []}}"), Kind::UnknownKey, 4, 31, "`alow`", "`allow`?"),
        (
            a("configuration: {resources: {ram: 1}}"),
            Kind::UnknownKey,
            4,
            33,
            "`ram`",
            "takes `cpu`, `memory`",
        ),
        (
            a("configuration: {container: {name: x, image: y}}"),
            Kind::UnknownKey,
            4,
            33,
            "`name`",
            "a pipeline",
        ),
        (
            "nmae: n\nname: n\nactions: {a: {commands: [x]}}".into(),
            Kind::UnknownKey,
            1,
            1,
            "`nmae`",
            "`name`?",
        ),
        (
            "name: n\nactions: {a: {commands: [x]}}\njobs: {}".into(),
            Kind::UnknownKey,
            3,
            1,
            "`jobs`",
            "`actions`?",
        ),
        (
            "name: n\n\"a\\eb\": 1\nactions: {a: {commands: [x]}}".into(),
            Kind::UnknownKey,
            2,
            1,
            "`a\\u{1b}b`",
            "",
        ),
        (a("matrix: {a: [1]}"), Kind::NotOffered, 4, 5, "`matrix` is not offered yet", "each combination"),
        (a("if: event.kind == 'push'"), Kind::NotOffered, 4, 5, "`if` is not offered yet", "in the commands"),
        (a("configuration: {resources: {disk: 1GiB}}"), Kind::NotOffered, 4, 33, "`disk`", "leave it out"),
        (
            "on: {push: }\nname: n\nactions: {a: {commands: [x]}}".into(),
            Kind::NotOffered,
            1,
            1,
            "`on`",
            "monitor",
        ),
    ]);
    for key in ["if", "matrix", "secrets", "approval", "priority", "finally", "extends"] {
        assert_each(&[(a(&format!("{key}: x")), Kind::NotOffered, 4, 5, "is not offered yet", "")]);
    }
    for key in ["on", "concurrency", "defaults", "release", "include"] {
        let text = format!("{key}: x\nname: n\nactions: {{a: {{commands: [x]}}}}");
        assert_each(&[(text, Kind::NotOffered, 1, 1, "is not offered yet", "")]);
    }
}

#[test]
fn networks_that_allow_what_cannot_be() {
    let a = action;
    let allow = |list: &str| action(&format!("configuration: {{network: {{allow: {list}}}}}"));
    assert_each(&[
        (
            allow("[\"https://a.b/c\"]"),
            Kind::Value,
            4,
            39,
            "`https://a.b/c` is the address of a page",
            "`a.b`",
        ),
        (allow("[x, \"y:0\"]"), Kind::Value, 4, 42, "`y:0` has no port", "1 to 65535"),
        (allow("[10.1.2.3/16]"), Kind::Value, 4, 39, "bits behind", "10.1.0.0/16"),
        (allow("[\"${{ x }}\"]"), Kind::NotOffered, 4, 39, "expressions", "value itself"),
        (allow("[]"), Kind::Missing, 4, 38, "`allow` allows nothing", "`network: off`"),
        (allow("x"), Kind::Shape, 4, 38, "a list of hosts", "packages.example.org:443"),
        (
            a("configuration: {network: {}}"),
            Kind::Missing,
            4,
            21,
            "`network` allows nothing",
            "`on` or `off`",
        ),
        (
            a("configuration: {network: {allow: [x]}, executor: process}"),
            Kind::Value,
            4,
            30,
            "`process` cannot hold",
            "`microvm`",
        ),
        (
            a("configuration: {network: {allow: [x]}, executor: docker, container: y}"),
            Kind::Value,
            4,
            30,
            "`docker` cannot hold",
            "`microvm`",
        ),
    ]);
}

#[test]
fn images_and_services_that_mean_nothing() {
    let a = action;
    let c = |fields: &str| action(&format!("configuration: {{container: {{image: y, {fields}}}}}"));
    let s = |fields: &str| action(&format!("services: {{db: {{container: y, {fields}}}}}"));
    assert_each(&[
        (c("pull: sometimes"), Kind::Value, 4, 49, "`sometimes` is not one of", "`never`"),
        (c("pull: alwys"), Kind::Value, 4, 49, "`alwys`", "did you mean `always`?"),
        (c("entrypoint: sh"), Kind::Value, 4, 55, "neither a list nor `image`", "a list of words"),
        (c("entrypoint: [{a: b}]"), Kind::Shape, 4, 56, "lists texts; this is a mapping", ""),
        (c("user: a b"), Kind::Value, 4, 49, "`a b` is no user", "`1000:1000`"),
        (a("services: [db]"), Kind::Shape, 4, 15, "wants a mapping of names to services", ""),
        (a("services: {db: postgres}"), Kind::Shape, 4, 20, "wants a mapping with `container`", ""),
        (a("services: {db: {}}"), Kind::Missing, 4, 16, "the service `db` has no `container`", "postgres:16"),
        (
            a("services: {DB: {container: x}}"),
            Kind::Value,
            4,
            16,
            "`DB` is no name of a host",
            "small letters",
        ),
        (a("services: {localhost: {container: x}}"), Kind::Value, 4, 16, "is the action itself", ""),
        (s("image: z"), Kind::UnknownKey, 4, 35, "`image` is no key of a service", "belongs in `container`"),
        (s("ready: pg_isready"), Kind::Shape, 4, 42, "wants a mapping with `command`", ""),
        (s("ready: {timeout: 3s}"), Kind::Missing, 4, 35, "`ready` has no `command`", "pg_isready"),
        (s("ready: {command: x, timeout: 0s}"), Kind::Value, 4, 64, "no time at all", ""),
        (s("command: run"), Kind::Shape, 4, 44, "wants a list of words", ""),
        (s("env: {CI: x}"), Kind::Reserved, 4, 41, "`CI` is set by SealCI", ""),
        (
            a("configuration: {executor: process}\nservices: {db: {container: x}}"),
            Kind::Value,
            5,
            5,
            "nothing can run beside it",
            "`sandbox` or `container`",
        ),
    ]);
    let many: String = (0..17).map(|i| format!("  s{i}: {{container: x}}\n")).collect();
    let errors = errors(a(&format!("services:\n{many}")));
    assert!(errors.to_string().contains("17 services, at most 16"), "{errors}");
}

#[test]
fn files_that_cannot_be_meant() {
    let a = action;
    let p = |path: &str| action(&format!("artifacts: {{paths: [{path}]}}"));
    let k = |key: &str| action(&format!("cache: [{{key: {key}, paths: [x]}}]"));
    assert_each(&[
        (p("../x"), Kind::Value, 4, 25, "`../x` leads out by `..`", "from the workspace"),
        (p("a/../../x"), Kind::Value, 4, 25, "leads out", ""),
        (p("/"), Kind::Value, 4, 25, "`/` is everything", "name a folder"),
        (p("~/x"), Kind::Value, 4, 25, "`~/x` is not in the workspace", "have a command put it there"),
        (p("~root/x"), Kind::Value, 4, 25, "another user's home", ""),
        (p("\"a\\u202Eb\""), Kind::Value, 4, 25, "do not show", ""),
        (p("\"\""), Kind::Value, 4, 25, "1 to 1024 bytes", ""),
        (p("[a]"), Kind::Shape, 4, 25, "`paths` lists texts; this is a list", ""),
        (p("\"${{ event.ref }}\""), Kind::NotOffered, 4, 25, "expressions", ""),
        (a("artifacts: {paths: []}"), Kind::Missing, 4, 24, "the list of paths is empty", ""),
        (a("artifacts: {}"), Kind::Missing, 4, 5, "`artifacts` has no `paths`", ""),
        (a("artifacts: {paths: [x], when: later}"), Kind::Value, 4, 35, "`later` is not one of", "`always`"),
        (a("artifacts: {paths: [x], keep: 4000d}"), Kind::Value, 4, 35, "too long", "`3650d`"),
        (a("artifacts: [x]"), Kind::Shape, 4, 16, "wants a mapping with `paths`", ""),
        (a("reports: {junit: x.xml}"), Kind::Shape, 4, 22, "wants a list of paths", ""),
        (a("reports: {tap: [x]}"), Kind::UnknownKey, 4, 15, "`tap` is no key of `reports`", "takes `junit`"),
        (a("cache: {key: x}"), Kind::Shape, 4, 12, "wants a list of caches", ""),
        (a("cache: [x]"), Kind::Shape, 4, 13, "a cache is a mapping", ""),
        (a("cache: [{paths: [x]}]"), Kind::Missing, 4, 13, "the cache has no `key`", "Cargo.lock"),
        (a("cache: [{key: x}]"), Kind::Missing, 4, 13, "the cache has no `paths`", ""),
        (k("\"\""), Kind::Value, 4, 19, "1 to 1024 bytes", ""),
        (k("\"${{ hash(x) }}\""), Kind::Value, 4, 19, "in quotes", "hash('Cargo.lock')"),
        (k("\"${{ matrix.x }}\""), Kind::Value, 4, 19, "`matrix.x` is no expression", "event.branch"),
        (a("uses: build"), Kind::Shape, 4, 11, "wants a list: `uses: [build]`", ""),
        (a("uses: [b]"), Kind::UnknownAction, 4, 12, "there is no action `b`", ""),
        (a("uses: [a]"), Kind::Value, 4, 12, "does not wait for it", "`needs`"),
    ]);
    let two = |second: &str| {
        format!("name: n\nactions:\n  a: {{commands: [x]}}\n  b: {{commands: [x], {second}}}\n")
    };
    assert_each(&[
        (two("uses: [a]"), Kind::Value, 4, 29, "`a` has no `artifacts`", "artifacts: {paths"),
        (two("needs: [], uses: [a]"), Kind::Value, 4, 40, "`b` uses `a`, and does not wait", "add `a`"),
    ]);
    let twice = "name: n\nactions:\n  a: {commands: [x], artifacts: {paths: [x]}}\n  b: {commands: [x], uses: [a, a]}\n";
    assert_each(&[(twice.into(), Kind::Duplicate, 4, 32, "`a` is used twice", "")]);
}

#[test]
fn values_that_say_nothing_their_key_understands() {
    let a = action;
    assert_each(&[
        (a("timeout: 20x"), Kind::Value, 4, 14, "`timeout`: `20x` is no duration", "`1h30m`"),
        (a("timeout: 30"), Kind::Value, 4, 14, "`30`", "add the unit: `30s`"),
        (a("timeout: 8d"), Kind::Value, 4, 14, "`8d` is too long", "`7d`"),
        (a("timeout: 0s"), Kind::Value, 4, 14, "no time at all", "`1s`"),
        (
            a("timeout: [1m]"),
            Kind::Shape,
            4,
            14,
            "wants a duration (`20m`); this is a list",
            "write a duration",
        ),
        (a("timeout:"), Kind::Missing, 4, 5, "`timeout` has no value", "leave the key out"),
        (a("allow-failure: maybe"), Kind::Value, 4, 20, "`maybe` is neither yes nor no", "`true`"),
        (a("allow-failure: 3"), Kind::Value, 4, 20, "`3`", "`[3]`"),
        (a("allow-failure: [1, 300]"), Kind::Value, 4, 24, "`300` is no exit code", "1 to 255"),
        (a("allow-failure: [1, 1]"), Kind::Duplicate, 4, 24, "1 is there twice", ""),
        (a("allow-failure: [[1]]"), Kind::Shape, 4, 21, "lists exit codes; this is a list", ""),
        (a("allow-failure: []"), Kind::Missing, 4, 20, "lists no exit code", "`false`"),
        (a("shell: zsh"), Kind::Value, 4, 12, "no shell is called `zsh`", "`sh` or `bash`"),
        (a("env: [A=1]"), Kind::Shape, 4, 10, "`env` wants a mapping", ""),
        (a("env: {1A: x}"), Kind::Value, 4, 11, "`1A` is no name of a variable", ""),
        (a("env: {A-B: x}"), Kind::Value, 4, 11, "`A-B`", "letters, digits and `_`"),
        (a("env: {CI: x}"), Kind::Reserved, 4, 11, "`CI` is set by SealCI", ""),
        (a("env: {SEALCI_REF: x}"), Kind::Reserved, 4, 11, "`SEALCI_REF`", "another name"),
        (a("env: {A: }"), Kind::Missing, 4, 11, "`A` has no value", "`\"\"` for an empty one"),
        (a("env: {A: [x]}"), Kind::Shape, 4, 14, "`A` wants a text", ""),
        (a("env: {A: \"x\\0y\"}"), Kind::Value, 4, 14, "U+0000", ""),
        (a("env: {A: \"${{ event.ref }}\"}"), Kind::NotOffered, 4, 14, "expressions", "the value itself"),
        (
            a("configuration: {container: \"rust:${{ matrix.rust }}\"}"),
            Kind::NotOffered,
            4,
            32,
            "expressions",
            "",
        ),
        (a("configuration: {container: \"\"}"), Kind::Value, 4, 32, "no name of an image", ""),
        (a("configuration: {container: -x}"), Kind::Value, 4, 32, "`-x`", ""),
        (a("configuration: {container: {}}"), Kind::Missing, 4, 21, "names no `image`", ""),
        (
            a("configuration: {executor: sandbx}"),
            Kind::Value,
            4,
            31,
            "no executor is called `sandbx`",
            "`sandbox`?",
        ),
        (a("configuration: {executor: kubernetes}"), Kind::Value, 4, 31, "", "process, sandbox, container"),
        (a("configuration: {container: x, executor: sandbox}"), Kind::Value, 4, 45, "without an image", ""),
        (a("configuration: {network: true}"), Kind::Value, 4, 30, "neither on nor off", "`on`, `off`"),
        (a("configuration: {resources: {cpu: many}}"), Kind::Value, 4, 38, "no number of CPUs", "`500m`"),
        (a("configuration: {resources: {cpu: 0}}"), Kind::Value, 4, 38, "out of range", ""),
        (a("configuration: {resources: {memory: 512}}"), Kind::Value, 4, 41, "less than 1 MiB", "`512MiB`?"),
        (a("configuration: {resources: {memory: 2Gi}}"), Kind::Value, 4, 41, "no amount of memory", "`2GiB`"),
        (a("configuration: {resources: 2}"), Kind::Shape, 4, 32, "wants a mapping with `cpu`", ""),
        (a("configuration: {labels: {a b: x}}"), Kind::Value, 4, 30, "no name of a label", ""),
        (
            a("configuration: {labels: {a: \"x\\ny\"}}"),
            Kind::Value,
            4,
            33,
            "`a`: the value is longer than 128 bytes or",
            "one line",
        ),
        (a("configuration: {labels: [a]}"), Kind::Shape, 4, 29, "mapping of labels", ""),
        (a("configuration: on"), Kind::Shape, 4, 20, "`configuration` wants a mapping", ""),
    ]);
}

#[test]
fn retries_that_are_none() {
    let a = action;
    assert_each(&[
        (
            a("retry: 2"),
            Kind::Shape,
            4,
            12,
            "`retry` wants a mapping with `times`",
            "`{times: 2, on: [failed]}`",
        ),
        (a("retry: {on: [failed]}"), Kind::Missing, 4, 5, "`retry` has no `times`", "`times: 2`"),
        (a("retry: {times: 0}"), Kind::Value, 4, 20, "`0` is no number of retries", "from 1 to 10"),
        (a("retry: {times: 11}"), Kind::Value, 4, 20, "`11`", "from 1 to 10"),
        (a("retry: {times: -1}"), Kind::Value, 4, 20, "`-1`", "leave `retry` out"),
        (a("retry: {times: +2}"), Kind::Value, 4, 20, "`+2`", "from 1 to 10"),
        (a("retry: {times: 2, on: failed}"), Kind::Shape, 4, 27, "`on` wants a list", "`timed_out`"),
        (a("retry: {times: 2, on: []}"), Kind::Missing, 4, 27, "`on` lists nothing", "leave `retry` out"),
        (a("retry: {times: 2, on: [timedout]}"), Kind::Value, 4, 28, "`timedout` is no end", "`timed_out`?"),
        (a("retry: {times: 2, on: [cancelled]}"), Kind::Value, 4, 28, "`cancelled` is no end", "`errored`"),
        (
            a("retry: {times: 2, on: [failed, failed]}"),
            Kind::Duplicate,
            4,
            36,
            "`failed` is there twice",
            "once",
        ),
        (a("retry: {time: 2, times: 2}"), Kind::UnknownKey, 4, 13, "`time` is no key of `retry`", "`times`?"),
        (
            a("exclusive: yes"),
            Kind::Value,
            4,
            16,
            "`exclusive`: `yes` is not one of `true`, `false`",
            "`true`",
        ),
        (a("exclusive: [true]"), Kind::Shape, 4, 16, "`exclusive` wants one of", "`false`"),
        (a("retries: 2"), Kind::UnknownKey, 4, 5, "`retries`", "did you mean `retry`?"),
        (a("attempts: 2"), Kind::UnknownKey, 4, 5, "`attempts`", "did you mean `retry`?"),
    ]);
}

#[test]
fn structures_that_are_no_pipeline() {
    let whole = |text: &str| text.to_owned();
    let commands = |text: &str| format!("name: n\nactions:\n  a:\n    commands: {text}\n");
    let named = |name: &str| format!("name: {name}\nactions: {{a: {{commands: [x]}}}}");
    let called = |name: &str| format!("name: n\nactions:\n  {name}: {{commands: [x]}}");
    assert_each(&[
        (whole(""), Kind::Missing, 1, 1, "the manifest is empty", "`name: …`"),
        (whole("# only a comment\n"), Kind::Missing, 1, 1, "empty", ""),
        (whole("---\n...\n"), Kind::Missing, 1, 1, "empty", ""),
        (whole("- a\n- b\n"), Kind::Shape, 1, 1, "this is a list", ""),
        (whole("just text"), Kind::Shape, 1, 1, "this is a text", ""),
        (whole("\nactions: {a: {commands: [x]}}"), Kind::Missing, 2, 1, "no `name`", "`name: my pipeline`"),
        (whole("name: n"), Kind::Missing, 1, 1, "no `actions`", ""),
        (whole("name: n\nactions:"), Kind::Missing, 2, 1, "`actions` has no value", ""),
        (whole("name: n\nactions: {}"), Kind::Missing, 2, 10, "there is no action", ""),
        (whole("name: n\nactions: [a]"), Kind::Shape, 2, 10, "`actions` wants a mapping", ""),
        (whole("name: n\nactions: {a: make}"), Kind::Shape, 2, 14, "`a` wants a mapping with `commands`", ""),
        (whole("name: n\nactions: {a: }"), Kind::Missing, 2, 11, "`a` has no value", ""),
        (whole("name: n\nactions: {a: {needs: []}}"), Kind::Missing, 2, 11, "`a` has no `commands`", ""),
        (whole("name:\nactions: {a: {commands: [x]}}"), Kind::Missing, 1, 1, "`name` has no value", ""),
        (named("{a: b}"), Kind::Shape, 1, 7, "`name` wants a text", ""),
        (named("a/../b"), Kind::Value, 1, 7, "leads elsewhere", "`..`"),
        (named("\"a\\nb\""), Kind::Value, 1, 7, "has U+000A", ""),
        (named("' a'"), Kind::Value, 1, 7, "begins or ends with a blank", ""),
        (whole("name: n\nactions: {a: {script: [x]}}"), Kind::UnknownKey, 2, 15, "`script`", "`commands`?"),
        (whole("name: n\njobs: {a: {commands: [x]}}"), Kind::UnknownKey, 2, 1, "`jobs`", "`actions`?"),
        (named("café"), Kind::Value, 1, 7, "has `é`", "letters, digits"),
        (called("a/../../b"), Kind::Value, 3, 3, "the name `a/../../b` reads like a path", ""),
        (called("\"\""), Kind::Value, 3, 3, "is empty", ""),
        (called("\"a\\u202Eb\""), Kind::Value, 3, 3, "`a\\u{202e}b` has U+202E", ""),
        (called("\"a\\u001bb\""), Kind::Value, 3, 3, "has U+001B", ""),
        (called(&"n".repeat(129)), Kind::Value, 3, 3, "has 129 bytes, at most 128", "shorten"),
        (commands("make"), Kind::Shape, 4, 15, "wants a list", "put `- ` before each command"),
        (commands("[]"), Kind::Missing, 4, 15, "`commands` is empty", ""),
        (commands("{a: b}"), Kind::Shape, 4, 15, "this is a mapping", ""),
        (commands("['']"), Kind::Missing, 4, 16, "the command is empty", ""),
        (commands("\n    - x\n    -\n"), Kind::Missing, 6, 6, "the command is empty", "remove the `-`"),
        (commands("[{a: b}]"), Kind::Shape, 4, 16, "a command is a text", "quote the command"),
        (commands("[[a]]"), Kind::Shape, 4, 16, "a command is a text; this is a list", ""),
        (commands("\n    - run: x\n      name: y"), Kind::Shape, 5, 7, "a command is a text", ""),
        (commands("['echo ${{ x }}']"), Kind::NotOffered, 4, 16, "expressions", "`$SEALCI_REF`"),
        (commands("\n    - echo so: ${{ x }}"), Kind::NotOffered, 5, 7, "expressions", ""),
        (
            whole("name: n\nname: m\nactions: {a: {commands: [x]}}"),
            Kind::Duplicate,
            2,
            1,
            "(first on line 1)",
            "",
        ),
        (
            whole("name: n\nactions:\n  a: {commands: [x]}\n  b: {commands: [x]}\n  a: {commands: [y]}\n"),
            Kind::Duplicate,
            5,
            3,
            "`a` is there twice (first on line 3)",
            "rename one",
        ),
        (action("env: {A: 1, A: 2}"), Kind::Duplicate, 4, 17, "`A` is there twice (first on line 4)", ""),
    ]);
}

#[test]
fn needs_that_cannot_be_met() {
    let actions = |text: &str| format!("name: n\nactions:\n{text}");
    assert_each(&[
        (
            actions("  build: {commands: [x]}\n  t: {commands: [x], needs: [biuld]}"),
            Kind::UnknownAction,
            4,
            30,
            "there is no action `biuld`",
            "did you mean `build`?",
        ),
        (
            actions("  a: {commands: [x], needs: [zzzzz]}"),
            Kind::UnknownAction,
            3,
            30,
            "`zzzzz`",
            "name an action",
        ),
        (actions("  a: {commands: [x], needs: [a]}"), Kind::Cycle, 3, 30, "`a` needs itself", ""),
        (
            actions("  a: {commands: [x]}\n  b: {commands: [x], needs: [a, a]}"),
            Kind::Duplicate,
            4,
            33,
            "`a` is needed twice (first on line 4)",
            "once",
        ),
        (
            actions("  a: {commands: [x], needs: b}\n  b: {commands: [x]}"),
            Kind::Shape,
            3,
            29,
            "wants a list",
            "`needs: [b]`",
        ),
        (
            actions("  a: {commands: [x], needs: }\n  b: {commands: [x]}"),
            Kind::Missing,
            3,
            22,
            "`needs` has no value",
            "`[]` to start at once",
        ),
        (
            actions("  a: {commands: [x], needs: [[b]]}\n  b: {commands: [x]}"),
            Kind::Shape,
            3,
            30,
            "`needs` lists names of actions; this is a list",
            "",
        ),
        (
            actions("  a: {commands: [x], needs: [b]}\n  b: {commands: [x]}"),
            Kind::Cycle,
            3,
            30,
            "`a` → `b` → `a`",
            "`b` has no `needs`, so it needs the action before it, `a`: give it `needs: []`",
        ),
        (
            actions(
                "  a: {commands: [x], needs: [c]}\n  b: {commands: [x], needs: [a]}\n  c: {commands: [x], needs: [b]}\n  d: {commands: [x]}",
            ),
            Kind::Cycle,
            3,
            30,
            "`a` → `c` → `b` → `a`",
            "remove one of these needs",
        ),
    ]);
}

#[test]
fn yaml_that_manifests_do_not_use() {
    let whole = |text: &str| text.to_owned();
    assert_each(&[
        (action("env: &e {A: b}"), Kind::Yaml, 4, 10, "anchors (`&…`)", "write the value out"),
        (action("env: *e"), Kind::Yaml, 4, 10, "aliases (`*…`)", "quote a text that begins with `*`"),
        (action("timeout: !!str 3m"), Kind::Yaml, 4, 14, "tags (`!…`)", "always the text as written"),
        (action("? [a]\n: b"), Kind::Yaml, 4, 7, "a key must be a text", ""),
        (action("env: {: x}"), Kind::Yaml, 4, 11, "the key is missing", ""),
        (
            whole("name: n\nactions: {a: {commands: [x]}}\n---\nname: m\n"),
            Kind::Yaml,
            3,
            1,
            "a second document",
            "a file of its own",
        ),
        (whole("name: n\n\tactions: x"), Kind::Syntax, 2, 1, "not YAML", "spaces"),
        (whole("name: n\nactions:\n\ta:\n"), Kind::Syntax, 3, 1, "not YAML", "spaces"),
        (whole("name: 'n\nactions: x\n"), Kind::Syntax, 1, 7, "not YAML", "close the quote"),
        (whole("name: [n\nactions: x\n"), Kind::Syntax, 2, 8, "not YAML", "close an open `[`"),
        (whole("name: a: b\n"), Kind::Syntax, 1, 8, "not YAML", "quote a text that contains `: `"),
        (whole("name: @n\n"), Kind::Syntax, 1, 7, "not YAML: unexpected character: `@'", "quote"),
        (whole("name: n\n  x: y\n"), Kind::Syntax, 2, 4, "not YAML", ""),
    ]);
}

#[test]
fn bytes_that_are_no_text() {
    let utf16 = |text: &str, mark: &[u8], bytes: fn(u16) -> [u8; 2]| {
        let encoded = text.encode_utf16().flat_map(bytes);
        mark.iter().copied().chain(encoded).collect::<Vec<u8>>()
    };
    let good = "name: n\nactions: {a: {commands: [x]}}";
    let table: &[(Vec<u8>, usize, usize, &str)] = &[
        (utf16(good, b"\xFF\xFE", u16::to_le_bytes), 1, 1, "UTF-16"),
        (utf16(good, b"\xFE\xFF", u16::to_be_bytes), 1, 1, "UTF-16"),
        (utf16(good, b"", u16::to_le_bytes), 1, 1, "UTF-16"),
        (utf16(good, b"", u16::to_be_bytes), 1, 1, "UTF-16"),
        (good.chars().flat_map(|c| u32::from(c).to_le_bytes()).collect(), 1, 1, "UTF-32"),
        (good.chars().flat_map(|c| u32::from(c).to_be_bytes()).collect(), 1, 1, "UTF-32"),
        (b"name: caf\xE9\nactions: {}".to_vec(), 1, 10, "0xE9 here is not UTF-8"),
        (b"name: n\nx: \xC3".to_vec(), 2, 4, "0xC3"),
        (b"name: n\nac\0tions: x".to_vec(), 2, 3, "U+0000"),
        (b"name: \x1b[31mn\nactions: {}".to_vec(), 1, 7, "U+001B"),
        ("name: n\u{9b}\n".into(), 1, 8, "U+009B"),
        ("name: n\u{FFFE}\n".into(), 1, 8, "U+FFFE"),
    ];
    for (bytes, line, column, message) in table {
        let errors = errors(bytes);
        let [error] = errors.errors() else { panic!("{errors}") };
        assert_eq!((error.kind, error.line, error.column), (Kind::Encoding, *line, *column), "{errors}");
        assert!(error.message.contains(message), "{errors}");
    }
    let errors = errors("name\0a\0\0c\u{7f}");
    assert_eq!(errors.errors().len(), 3, "{errors}");
}

#[test]
fn everything_wrong_is_said_at_once() {
    let errors = errors(include_str!("manifests/many_errors.yaml"));
    let found: Vec<_> = errors.errors().iter().map(|error| (error.line, error.column, error.kind)).collect();
    let expected = [
        (1, 7, Kind::Value),
        (2, 1, Kind::NotOffered),
        (4, 3, Kind::Reserved),
        (5, 3, Kind::Value),
        (8, 14, Kind::Value),
        (9, 5, Kind::UnknownKey),
        (11, 13, Kind::UnknownAction),
        (11, 20, Kind::Cycle),
        (13, 17, Kind::Value),
        (14, 7, Kind::UnknownKey),
        (17, 9, Kind::NotOffered),
        (18, 5, Kind::Duplicate),
    ];
    assert_eq!(found, expected, "{errors}");
}

#[test]
fn the_plain_rendering_shows_source_caret_and_help() {
    let text = "name: n\nenv: {\u{202e}: é, B: \u{9}x, C: }\nactions:\n  a:\n    comands: [make]\n  b:\n    commands: [x]\n    commands: [y]\n";
    let expected = "\
ci.yaml:2:7: `\\u{202e}` is no name of a variable
  2 | env: {\u{FFFD}: é, B:  x, C: }
    |       ^
  help: a variable has letters, digits and `_`, and does not begin with a digit

ci.yaml:2:20: `C` has no value
  2 | env: {\u{FFFD}: é, B:  x, C: }
    |                    ^
  help: write a text (`\"\"` for an empty one), or leave the key out

ci.yaml:5:5: `comands` is no key of an action
  5 |     comands: [make]
    |     ^^^^^^^
  help: did you mean `commands`?

ci.yaml:8:5: `commands` is there twice (first on line 7)
  8 |     commands: [y]
    |     ^^^^^^^^
  help: keep one of them, or rename one";
    assert_eq!(errors(text).to_string(), expected);
    assert_eq!(
        errors("").to_string(),
        "ci.yaml:1:1: the manifest is empty\n  help: a manifest begins with `name: …` and `actions:`"
    );
    let hostile = ManifestSource { name: "a\u{1b}]0;b\n.yaml", text: b"x" };
    let rendered = parse(&hostile).unwrap_err().to_string();
    assert!(rendered.starts_with("a?]0;b?.yaml:1:1: a manifest is a mapping"), "{rendered}");
}

#[test]
fn a_long_line_is_rendered_in_part() {
    let text = format!(
        "name: n\nactions: {{a: {{commands: [{}, {{a: b}}, {}]}}}}",
        "x, ".repeat(300) + "y",
        "z, ".repeat(300)
    );
    let rendered = errors(&text).to_string();
    let lines: Vec<&str> = rendered.lines().collect();
    assert_eq!(lines[0], "ci.yaml:2:929: a command is a text; this is a mapping");
    assert!(
        lines[1].starts_with("  2 | …") && lines[1].ends_with('…') && lines[1].chars().count() < 150,
        "{rendered}"
    );
    let caret = lines[2].chars().position(|c| c == '^').unwrap();
    assert!(lines[1].chars().skip(caret).collect::<String>().starts_with("{a: b}"), "{rendered}");
    let fancy = fancy(&errors(&text));
    assert!(fancy.contains("{a: b}") && fancy.len() < 4000, "{fancy}");
}

fn fancy(errors: &ManifestErrors) -> String {
    let theme = miette::GraphicalTheme::none();
    let mut drawn = String::new();
    let report = errors.to_report();
    miette::GraphicalReportHandler::new_themed(theme).render_report(&mut drawn, report.as_ref()).unwrap();
    drawn
}

#[test]
fn a_terminal_gets_every_error_drawn_around_its_source() {
    let drawn =
        fancy(&errors("name: n\nactions:\n  a:\n    comands: [make]\n    timeout: 3\n    timeout: 4m\n"));
    for part in [
        "3 errors in ci.yaml",
        "[ci.yaml:4:5]",
        "`comands` is no key of an action",
        "did you mean `commands`?",
        "[ci.yaml:5:14]",
        "add the unit: `3s` or `3m`",
        "`timeout` is there twice (first on line 5)",
        "[ci.yaml:6:5]",
        "first here",
        "again here",
    ] {
        assert!(drawn.contains(part), "{drawn}\nwants: {part}");
    }
    let drawn = fancy(&errors(""));
    assert!(drawn.contains("the manifest is empty"), "{drawn}");
    let drawn = fancy(&errors("name: n\u{1b}[2Jx\nactions: [a\rb]\n"));
    assert!(!drawn.contains(['\u{1b}', '\r']), "{drawn:?}");
}

#[test]
fn programs_get_values() {
    let errors = errors("name: n\nactions:\n  a:\n\tcommands: [x]\n");
    let views = serde_json::to_value(errors.views()).unwrap();
    let expected = serde_json::json!([{
        "file": "ci.yaml",
        "line": 4,
        "column": 1,
        "kind": "syntax",
        "message": views[0]["message"],
        "help": "indent with spaces: YAML allows no tabs there",
        "source_line": " commands: [x]",
    }]);
    assert_eq!(views, expected);
}
