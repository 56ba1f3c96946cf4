//! Reads what single texts say: durations, amounts, names. Each reader says what is wrong and what to write instead.

use std::time::Duration;

use super::source::quoted;
use super::{MAX_NAME_BYTES, MAX_PATH_BYTES};

/// Why a text is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// A sentence that needs no subject but the key: "`20x` is no duration".
    pub(super) message: String,
    pub(super) mend: String,
}

impl Refusal {
    pub(super) fn new(message: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { message: message.into(), mend: mend.into() }
    }
}

/// The longest an action may take.
pub(super) const MAX_TIMEOUT: Duration = Duration::from_secs(7 * 86_400);
/// The longest an artifact is kept that says how long.
const MAX_KEEPING_TIME: Duration = Duration::from_secs(3650 * 86_400);
const MAX_CPU_MILLIS: u64 = 1_024_000;
const MIN_MEMORY_BYTES: u64 = 1 << 20;
const MAX_MEMORY_BYTES: u64 = 16 << 40;

/// `30s`, `20m`, `1h30m`, `2d`: units from large to small, each at most once.
pub(super) fn timeout(text: &str) -> Result<Duration, Refusal> {
    duration(text, MAX_TIMEOUT, "7d")
}

/// How long something is kept; written as a timeout is.
pub(super) fn keeping_time(text: &str) -> Result<Duration, Refusal> {
    duration(text, MAX_KEEPING_TIME, "3650d")
}

fn duration(text: &str, most: Duration, most_shown: &str) -> Result<Duration, Refusal> {
    let wrong = || {
        let mend = match text.parse::<u64>() {
            Ok(number) => format!("add the unit: `{number}s` or `{number}m`"),
            Err(_) => "write it as `30s`, `20m`, `1h30m` or `2d`".to_owned(),
        };
        Refusal::new(format!("{} is no duration", quoted(text)), mend)
    };
    let out_of_range = |what| {
        Refusal::new(format!("{} is {what}", quoted(text)), format!("write between `1s` and `{most_shown}`"))
    };
    let mut rest = text;
    let mut seconds: u64 = 0;
    let mut units = [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)].into_iter();
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, after) = rest.split_at(digits);
        if number.is_empty() {
            return Err(wrong());
        }
        // Taking from the iterator leaves only smaller units for what follows.
        let (unit, factor) = units.find(|(unit, _)| after.starts_with(unit)).ok_or_else(wrong)?;
        let number = number.parse::<u64>().ok().filter(|number| *number < 1 << 32);
        seconds += number.ok_or_else(|| out_of_range("too long"))? * factor;
        rest = &after[unit.len()..];
    }
    let duration = Duration::from_secs(seconds);
    if text.is_empty() {
        return Err(wrong());
    }
    match duration {
        duration if duration > most => Err(out_of_range("too long")),
        Duration::ZERO => Err(out_of_range("no time at all")),
        duration => Ok(duration),
    }
}

/// `2`, `0.5`, `500m`, in thousandths.
pub(super) fn cpu_millis(text: &str) -> Result<u64, Refusal> {
    let millis = match text.strip_suffix('m') {
        Some(millis) => Decimal::parse(millis).and_then(|number| number.times(1)),
        None => Decimal::parse(text).and_then(|number| number.times(1000)),
    };
    let mend = "write a number of CPUs: `1`, `0.5` or `500m` (thousandths)";
    match millis {
        None => Err(Refusal::new(format!("{} is no number of CPUs", quoted(text)), mend)),
        Some(millis) if !(1..=MAX_CPU_MILLIS).contains(&millis) => {
            Err(Refusal::new(format!("{} is out of range", quoted(text)), "write between `1m` and `1024`"))
        }
        Some(millis) => Ok(millis),
    }
}

const MEMORY_UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("", 1),
];

/// `512MiB`, `1.5GiB`, `1GB`, or plain bytes.
pub(super) fn memory_bytes(text: &str) -> Result<u64, Refusal> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = MEMORY_UNITS.iter().find(|(name, _)| *name == unit.trim_start()).map(|(_, factor)| *factor);
    let bytes = factor.and_then(|factor| Decimal::parse(number)?.times(factor));
    match bytes {
        None => {
            let mend = match likely_unit(unit) {
                Some(likely) if Decimal::parse(number).is_some() => format!("write `{number}{likely}`"),
                _ => "write it as `512MiB`, `2GiB` or `1GB`, or in bytes".to_owned(),
            };
            Err(Refusal::new(format!("{} is no amount of memory", quoted(text)), mend))
        }
        Some(bytes) if bytes < MIN_MEMORY_BYTES => {
            let mend = match unit {
                "" if !number.is_empty() => format!("a number alone is bytes: did you mean `{number}MiB`?"),
                _ => "write at least `1MiB`".to_owned(),
            };
            Err(Refusal::new(format!("{} is less than 1 MiB", quoted(text)), mend))
        }
        Some(bytes) if bytes > MAX_MEMORY_BYTES => {
            Err(Refusal::new(format!("{} is out of range", quoted(text)), "write at most `16TiB`"))
        }
        Some(bytes) => Ok(bytes),
    }
}

/// What other systems call our units: `Mi`, `mb`, `g`.
fn likely_unit(unit: &str) -> Option<&'static str> {
    match unit.trim().chars().next()?.to_ascii_lowercase() {
        'k' => Some("KiB"),
        'm' => Some("MiB"),
        'g' => Some("GiB"),
        't' => Some("TiB"),
        _ => None,
    }
}

/// A number as written, exact: `digits / 10^scale`.
struct Decimal {
    digits: u128,
    scale: u32,
}

impl Decimal {
    /// At most 15 digits before the point and 9 behind it, and at least one on each side that is there.
    fn parse(text: &str) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |part: &str, most: usize| {
            (1..=most).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit())
        };
        if !digits(whole, 15) || !digits(fraction, 9) {
            return None;
        }
        let digits = format!("{whole}{fraction}").parse().ok()?;
        Some(Self { digits, scale: u32::try_from(fraction.len()).ok()? })
    }

    /// The product, if it is whole.
    fn times(self, factor: u64) -> Option<u64> {
        let product = self.digits.checked_mul(u128::from(factor))?;
        let divisor = 10_u128.pow(self.scale);
        if product % divisor == 0 { u64::try_from(product / divisor).ok() } else { None }
    }
}

/// A pipeline's or an action's name. It may stand in paths and URLs, so it has no component that means another place.
pub(super) fn name(text: &str) -> Result<(), Refusal> {
    let allowed = "letters, digits, blanks and `._()/,-`";
    if text.is_empty() {
        return Err(Refusal::new("the name is empty", "give it a name"));
    }
    if text.len() > MAX_NAME_BYTES {
        let message = format!("the name has {} bytes, at most {MAX_NAME_BYTES} are taken", text.len());
        return Err(Refusal::new(message, "shorten it"));
    }
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || " ._()/,-".contains(c);
    if let Some(c) = text.chars().find(|c| !is_allowed(*c)) {
        let shown = if super::source::is_deceptive(c) || c == '`' {
            format!("U+{:04X}", u32::from(c))
        } else {
            format!("`{c}`")
        };
        return Err(Refusal::new(
            format!("the name {} has {shown}", quoted(text)),
            format!("a name has {allowed}"),
        ));
    }
    if text.trim() != text {
        return Err(Refusal::new(
            format!("the name {} begins or ends with a blank", quoted(text)),
            "remove the blank",
        ));
    }
    if text.split('/').any(|part| matches!(part.trim(), "" | "." | "..")) {
        return Err(Refusal::new(
            format!("the name {} reads like a path that leads elsewhere", quoted(text)),
            "leave out `..`, `.` and doubled `/`",
        ));
    }
    Ok(())
}

/// A variable's name, as POSIX shells take it.
pub(super) fn variable_name(text: &str) -> Result<(), Refusal> {
    let mut bytes = text.bytes();
    let begins = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    if begins && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return Ok(());
    }
    let mend = "a variable has letters, digits and `_`, and does not begin with a digit";
    Err(Refusal::new(format!("{} is no name of a variable", quoted(text)), mend))
}

/// Whether SealCI sets the variable itself.
pub(super) fn is_reserved_variable(name: &str) -> bool {
    matches!(name, "CI" | "SEALCI" | "TRACEPARENT") || name.starts_with("SEALCI_")
}

/// What a label is called.
pub(super) fn label_name(text: &str) -> Result<(), Refusal> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._/-".contains(&byte);
    if (1..=MAX_NAME_BYTES).contains(&text.len()) && text.bytes().all(is_allowed) {
        return Ok(());
    }
    let mend = format!("a label has letters, digits and `._/-`, at most {MAX_NAME_BYTES} bytes");
    Err(Refusal::new(format!("{} is no name of a label", quoted(text)), mend))
}

/// What a label says.
pub(super) fn label_value(text: &str) -> Result<(), Refusal> {
    if text.len() > MAX_NAME_BYTES || text.chars().any(super::source::is_deceptive) {
        let mend = format!("write a text of one line, at most {MAX_NAME_BYTES} bytes");
        return Err(Refusal::new("the value is longer than 128 bytes or has control characters", mend));
    }
    Ok(())
}

/// An image's name as a whole; its grammar is checked by who pulls it.
pub(super) fn image(text: &str) -> Result<(), Refusal> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:/@+-".contains(&byte);
    if (1..=512).contains(&text.len()) && text.bytes().all(is_allowed) && !text.starts_with('-') {
        return Ok(());
    }
    let mend = "write it as `debian:bookworm` or `registry.example.org/team/image@sha256:…`";
    Err(Refusal::new(format!("{} is no name of an image", quoted(text)), mend))
}

/// Whom a container's process runs as: a name or a number, and perhaps a group behind a colon.
pub(super) fn user(text: &str) -> Result<(), Refusal> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let is_name =
        |part: &str| (1..=64).contains(&part.len()) && part.bytes().all(is_allowed) && !part.starts_with('-');
    let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    if is_name(user) && group.is_none_or(is_name) {
        return Ok(());
    }
    let mend = "write it as `1000`, `build` or `1000:1000`";
    Err(Refusal::new(format!("{} is no user", quoted(text)), mend))
}

/// A service's name: one label of a host name (RFC 1123), in lower case.
pub(super) fn host_name(text: &str) -> Result<(), Refusal> {
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let is_label = (1..=63).contains(&text.len())
        && text.bytes().all(is_allowed)
        && !text.starts_with('-')
        && !text.ends_with('-');
    match text {
        "localhost" => Err(Refusal::new("`localhost` is the action itself", "choose another name")),
        _ if is_label => Ok(()),
        _ => {
            let mend = "a service is reached by its name: small letters, digits and `-`, at most 63";
            Err(Refusal::new(format!("{} is no name of a host", quoted(text)), mend))
        }
    }
}

/// A file, folder or pattern: in the workspace, below `~/`, or absolute; behind a `!` it is left out.
pub(super) fn path(text: &str) -> Result<(), Refusal> {
    let path = text.strip_prefix('!').unwrap_or(text);
    let shown = quoted(text);
    if path.is_empty() || text.len() > MAX_PATH_BYTES {
        let message = format!("a path has 1 to {MAX_PATH_BYTES} bytes");
        return Err(Refusal::new(message, "write it as `target/report` or `**/*.xml`"));
    }
    if path.chars().any(super::source::is_deceptive) {
        return Err(Refusal::new(format!("{shown} has characters that do not show"), "remove them"));
    }
    if path.split('/').any(|part| part == "..") {
        let mend = "name it from the workspace, from `~/` or from `/` on";
        return Err(Refusal::new(format!("{shown} leads out by `..`"), mend));
    }
    if path.starts_with('~') && path != "~" && !path.starts_with("~/") {
        return Err(Refusal::new(
            format!("{shown} names another user's home"),
            "write `~/…` or an absolute path",
        ));
    }
    if path.trim_matches('/').is_empty() {
        return Err(Refusal::new(format!("{shown} is everything"), "name a folder"));
    }
    Ok(())
}

/// As [`path`], and in the workspace.
pub(super) fn workspace_path(text: &str) -> Result<(), Refusal> {
    path(text)?;
    let path = text.strip_prefix('!').unwrap_or(text);
    if path.starts_with(['/', '~']) {
        let mend = "have a command put it there, and name it from there on";
        return Err(Refusal::new(format!("{} is not in the workspace", quoted(text)), mend));
    }
    Ok(())
}

/// An exit code that may fail without harm.
pub(super) fn exit_code(text: &str) -> Result<i32, Refusal> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    match text.parse::<i32>() {
        Ok(code @ 1..=255) if plain => Ok(code),
        _ => Err(Refusal::new(format!("{} is no exit code", quoted(text)), "write a number from 1 to 255")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let seconds = |text| timeout(text).map(|timeout| timeout.as_secs());
        for (text, expected) in [
            ("30s", 30),
            ("20m", 1200),
            ("1h30m", 5400),
            ("2d", 172_800),
            ("1d2h3m4s", 93_784),
            ("90m", 5400),
            ("7d", 604_800),
            ("0h1s", 1),
        ] {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
        for text in [
            "",
            "s",
            "30",
            "1m1h",
            "1m1m",
            "1.5h",
            "-1s",
            "1 h",
            "1w",
            "7d1s",
            "0s",
            "8d",
            "99999999999999999999d",
            "4294967295d4294967295h",
            "1M",
        ] {
            assert!(timeout(text).is_err(), "{text}");
        }
        assert_eq!(timeout("30").unwrap_err().mend, "add the unit: `30s` or `30m`");
    }

    #[test]
    fn cpus() {
        for (text, expected) in
            [("1", 1000), ("0.5", 500), ("500m", 500), ("2.25", 2250), ("1024", 1_024_000)]
        {
            assert_eq!(cpu_millis(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "0m", "m", "-1", ".5", "1.", "0.0001", "1e3", "1025", "0.5m", "two", "1,5"] {
            assert!(cpu_millis(text).is_err(), "{text}");
        }
    }

    #[test]
    fn memory() {
        for (text, expected) in [
            ("512MiB", 512 << 20),
            ("2GiB", 2 << 30),
            ("2 GiB", 2 << 30),
            ("1GB", 1_000_000_000),
            ("1.5GiB", 3 << 29),
            ("1048576", 1 << 20),
            ("1024KiB", 1 << 20),
        ] {
            assert_eq!(memory_bytes(text), Ok(expected), "{text}");
        }
        for (text, mend) in [
            ("512", "a number alone is bytes: did you mean `512MiB`?"),
            ("512Mi", "write `512MiB`"),
            ("2g", "write `2GiB`"),
            ("1KiB", "write at least `1MiB`"),
            ("99999TiB", "write at most `16TiB`"),
            ("lots", "write it as `512MiB`, `2GiB` or `1GB`, or in bytes"),
            ("", "write it as `512MiB`, `2GiB` or `1GB`, or in bytes"),
            ("-1GiB", "write it as `512MiB`, `2GiB` or `1GB`, or in bytes"),
            ("999999999999999999999999GiB", "write it as `512MiB`, `2GiB` or `1GB`, or in bytes"),
        ] {
            assert_eq!(memory_bytes(text).map_err(|refusal| refusal.mend), Err(mend.to_owned()), "{text}");
        }
    }

    #[test]
    fn names() {
        for good in ["test", "test (stable, sqlite)", "a/b", "v1.2_3-x", "..a", "a..b", &"n".repeat(128)] {
            assert_eq!(name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            " a",
            "a ",
            "a/../b",
            "..",
            ".",
            "a/",
            "/a",
            "a//b",
            "a/ ../b",
            "é",
            "a\nb",
            "a\u{202e}b",
            "a\\b",
            "a:b",
            "a\0b",
        ] {
            assert!(name(bad).is_err(), "{bad}");
        }
        assert!(name(&"n".repeat(129)).is_err());
    }

    #[test]
    fn keeping_times() {
        assert_eq!(keeping_time("30d").map(|time| time.as_secs()), Ok(30 * 86_400));
        assert_eq!(keeping_time("4000d").unwrap_err().mend, "write between `1s` and `3650d`");
    }

    #[test]
    fn users_hosts_and_paths() {
        assert!(["0", "build", "1000:1000", "a.b-c_d:g"].iter().all(|text| user(text).is_ok()));
        assert!(["", ":", "a:", ":g", "a b", "-a", "a:b:c", "a\nb"].iter().all(|text| user(text).is_err()));
        assert!(["db", "a-1", "0"].iter().all(|text| host_name(text).is_ok()));
        let too_long = "a".repeat(64);
        let bad = ["", "DB", "a.b", "-a", "a-", "localhost", "a_b", "é", &too_long];
        assert!(bad.iter().all(|text| host_name(text).is_err()));
        let good = ["a", "a/b", "**/*.xml", "!**/x", "~/.cargo", "~", "/usr/local", "a..b", "..a/b", "{a,b}"];
        assert!(good.iter().all(|text| path(text).is_ok()));
        assert!(["a", "!a", "**/*.xml"].iter().all(|text| workspace_path(text).is_ok()));
        assert!(["/a", "~/a", "!~", "../a"].iter().all(|text| workspace_path(text).is_err()));
        let bad = ["", "!", "/", "//", "..", "a/../b", "../a", "~x/y", "a\nb", "a\u{202e}b"];
        assert!(bad.iter().all(|text| path(text).is_err()), "{bad:?}");
    }

    #[test]
    fn variables_labels_and_codes() {
        assert!(["A", "_a", "a1"].iter().all(|text| variable_name(text).is_ok()));
        assert!(["", "1A", "A-B", "A=B", "é"].iter().all(|text| variable_name(text).is_err()));
        assert!(["CI", "SEALCI", "SEALCI_X", "TRACEPARENT"].into_iter().all(is_reserved_variable));
        assert!(!["CIRCLE", "SEAL", "MY_CI"].into_iter().any(is_reserved_variable));
        assert!(label_name("gpu/kind").is_ok() && label_name("a b").is_err() && label_name("").is_err());
        assert!(label_value("").is_ok() && label_value("a\nb").is_err());
        assert_eq!(exit_code("255"), Ok(255));
        assert!(["0", "256", "-1", "", "x", "007", "+1"].iter().all(|text| exit_code(text).is_err()));
        assert!(
            image("rust:1.90").is_ok() && image("").is_err() && image("-x").is_err() && image("a b").is_err()
        );
    }
}
