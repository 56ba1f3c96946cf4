//! Reads JUnit's XML reports, of which there is no standard but what test runners write: suites with cases in them, a case
//! that did not pass with a `failure`, an `error` or a `skipped` inside.
//!
//! The files are an action's, so nothing in them is believed: cases are counted here, whatever totals are written; texts and
//! numbers of cases are bounded; a document type, and so every entity of its own, is refused.

use std::fmt;
use std::io::{self, Read};

use quick_xml::Reader;
use quick_xml::escape::unescape;
use quick_xml::events::{BytesStart, Event};
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio_util::io::SyncIoBridge;

use super::archives::FilesError;
use crate::causes::with_causes;
use crate::executor::door::{Door, TakeLimits};

/// Elements within one another.
const MAX_DEPTH: usize = 64;
/// Cases that did not pass and are kept with their message; further ones are only counted.
const MAX_SHOWN: usize = 100;
/// As long as the controller keeps them.
const MAX_NAME_BYTES: usize = 500;
const MAX_MESSAGE_BYTES: usize = 1000;
const MAX_TEXT_BYTES: usize = 4000;
/// A test that says it took longer took no time that is worth adding up.
const MAX_SECONDS: f64 = 1e7;
/// One file.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// Files that are named because they cannot be read.
const SHOWN_FILES: usize = 3;
const PIPE_BYTES: usize = 256 << 10;

/// What the reports of an action say together; in JSON as the controller's document has it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct TestReport {
    pub tests: u64,
    /// A check did not hold.
    pub failures: u64,
    /// The test itself broke.
    pub errors: u64,
    pub skipped: u64,
    /// Of all cases, one after the other.
    pub duration_ms: u64,
    /// What was not read, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// The first of those that failed or broke.
    pub failing: Vec<FailingTest>,
}

/// A case that failed or broke. Empty texts are not known.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct FailingTest {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub suite: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub class: String,
    pub name: String,
    pub kind: FailureKind,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    #[default]
    Failure,
    Error,
}

/// Why a file is no report.
#[derive(Debug, thiserror::Error)]
pub enum JunitError {
    #[error("it is not well-formed XML, at byte {at}: {source}")]
    Xml {
        at: u64,
        #[source]
        source: quick_xml::Error,
    },
    #[error("it has a document type, which is not read; leave the `<!DOCTYPE …>` out")]
    DocumentType,
    #[error("its elements are nested more than {MAX_DEPTH} deep")]
    TooDeep,
    #[error("it begins with `<{0}>`, not with `<testsuites>` or `<testsuite>`")]
    NotJunit(String),
    #[error("it has no element at all")]
    Empty,
}

/// The case that is being read.
#[derive(Default)]
struct Case {
    depth: usize,
    shown: FailingTest,
    verdict: Verdict,
    /// Whether text belongs to it now.
    in_verdict: bool,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    #[default]
    Passed,
    Skipped,
    Failed,
    Broke,
}

impl TestReport {
    /// Adds one file; nothing of a file that cannot be read to its end.
    pub fn add(&mut self, xml: &[u8]) -> Result<(), JunitError> {
        let mut added = self.clone();
        added.read(xml)?;
        *self = added;
        Ok(())
    }

    fn read(&mut self, xml: &[u8]) -> Result<(), JunitError> {
        let mut reader = Reader::from_reader(xml);
        reader.config_mut().expand_empty_elements = true;
        let mut suites: Vec<String> = Vec::new();
        let mut depth = 0;
        let mut case: Option<Case> = None;
        let mut begun = false;
        loop {
            let event = reader.read_event();
            let event = event.map_err(|source| JunitError::Xml { at: reader.error_position(), source })?;
            match event {
                Event::Start(element) => {
                    depth += 1;
                    if depth > MAX_DEPTH {
                        return Err(JunitError::TooDeep);
                    }
                    let name = element.local_name();
                    let name = name.as_ref();
                    if !begun && !matches!(name, b"testsuites" | b"testsuite") {
                        return Err(JunitError::NotJunit(shortened(&String::from_utf8_lossy(name), 40)));
                    }
                    begun = true;
                    match (&mut case, name) {
                        (None, b"testsuite" | b"testsuites") => suites.push(attribute(&element, b"name")),
                        (None, b"testcase") => case = Some(self.begin(&element, depth, &suites)),
                        (Some(case), _) => case.enter(&element, depth),
                        _ => {}
                    }
                }
                Event::End(element) => {
                    match &mut case {
                        Some(open) if open.depth == depth => self.end(case.take()),
                        Some(open) => open.in_verdict &= open.depth + 1 != depth,
                        None if matches!(element.local_name().as_ref(), b"testsuite" | b"testsuites") => {
                            suites.pop();
                        }
                        None => {}
                    }
                    depth -= 1;
                }
                Event::Text(text) => case.iter_mut().for_each(|case| case.read(&text)),
                Event::CData(text) => case.iter_mut().for_each(|case| case.read(&text)),
                Event::GeneralRef(name) => {
                    let reference = format!("&{};", String::from_utf8_lossy(&name));
                    let text = unescape(&reference).unwrap_or_default();
                    case.iter_mut().for_each(|case| case.read(text.as_bytes()));
                }
                Event::DocType(_) => return Err(JunitError::DocumentType),
                Event::Eof if begun => return Ok(()),
                Event::Eof => return Err(JunitError::Empty),
                _ => {}
            }
        }
    }

    fn begin(&mut self, element: &BytesStart<'_>, depth: usize, suites: &[String]) -> Case {
        self.tests += 1;
        let seconds = attribute(element, b"time").replace(',', "").parse::<f64>().unwrap_or(0.0);
        if (0.0..MAX_SECONDS).contains(&seconds) {
            self.duration_ms += (seconds * 1000.0).round() as u64;
        }
        let shown = FailingTest {
            suite: suites.last().cloned().unwrap_or_default(),
            class: attribute(element, b"classname"),
            name: attribute(element, b"name"),
            ..FailingTest::default()
        };
        Case { depth, shown, ..Case::default() }
    }

    fn end(&mut self, case: Option<Case>) {
        let Some(Case { mut shown, verdict, .. }) = case else { return };
        match verdict {
            Verdict::Passed => return,
            Verdict::Skipped => {
                self.skipped += 1;
                return;
            }
            Verdict::Failed => self.failures += 1,
            Verdict::Broke => {
                self.errors += 1;
                shown.kind = FailureKind::Error;
            }
        }
        if self.failing.len() < MAX_SHOWN {
            shown.text = shortened(shown.text.trim(), MAX_TEXT_BYTES);
            self.failing.push(shown);
        }
    }
}

impl Case {
    fn enter(&mut self, element: &BytesStart<'_>, depth: usize) {
        if depth != self.depth + 1 {
            return;
        }
        let verdict = match element.local_name().as_ref() {
            b"failure" => Verdict::Failed,
            b"error" => Verdict::Broke,
            b"skipped" => Verdict::Skipped,
            // Of a test that passed in the end (Maven): what it said when it did not.
            _ => return,
        };
        if self.verdict == Verdict::Passed || self.verdict == Verdict::Skipped {
            self.verdict = verdict;
            self.shown.message = attribute(element, b"message");
        }
        self.in_verdict = true;
    }

    fn read(&mut self, text: &[u8]) {
        // More than is kept, since the blanks around it are cut off later.
        if self.in_verdict && self.shown.text.len() < 2 * MAX_TEXT_BYTES {
            let part = &text[..text.len().min(2 * MAX_TEXT_BYTES)];
            self.shown.text.push_str(&String::from_utf8_lossy(part));
        }
    }
}

/// An attribute's value, shortened; empty where it has none that can be read.
fn attribute(element: &BytesStart<'_>, name: &[u8]) -> String {
    let most = if name == b"message" { MAX_MESSAGE_BYTES } else { MAX_NAME_BYTES };
    let found = element.attributes().flatten().find(|attribute| attribute.key.local_name().as_ref() == name);
    let Some(attribute) = found else { return String::new() };
    let text = String::from_utf8_lossy(&attribute.value);
    shortened(&unescape(&text).unwrap_or_default(), most)
}

fn shortened(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let end = (0..=most).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    format!("{}…", &text[..end])
}

/// Reads what the patterns choose; none where they choose nothing.
pub async fn collect(
    door: &Door,
    patterns: &[String],
    limits: TakeLimits,
) -> Result<Option<TestReport>, FilesError> {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let reading = tokio::task::spawn_blocking(move || read_all(SyncIoBridge::new(far)));
    let taking = async {
        let mut near = near;
        let taken = door.take(patterns, "/", limits, &mut near).await;
        // Its end is the archive's.
        let _ = near.shutdown().await;
        taken
    };
    let (taken, read) = tokio::join!(taking, reading);
    taken?;
    read.map_err(|_| FilesError::Broken)?.map_err(FilesError::Unpack)
}

fn read_all(tar: impl Read) -> io::Result<Option<TestReport>> {
    let mut report = TestReport::default();
    let mut files = 0;
    let mut refused = Vec::new();
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        files += 1;
        let why = if entry.size() > MAX_FILE_BYTES {
            Some(format!("it has more than {} MiB", MAX_FILE_BYTES >> 20))
        } else {
            let mut xml = Vec::new();
            entry.read_to_end(&mut xml)?;
            report.add(&xml).err().map(|error| with_causes(&error))
        };
        if let Some(why) = why {
            let name = entry.path_bytes();
            refused.push(format!("`/{}`: {why}", String::from_utf8_lossy(&name)));
        }
    }
    // What follows the archive's end is nobody's; who writes it shall not wait.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    if !refused.is_empty() {
        let count = refused.len();
        refused.truncate(SHOWN_FILES);
        let text = format!("{count} of {files} test reports are not read: {}", refused.join("; "));
        report.note = Some(shortened(&text, MAX_MESSAGE_BYTES));
    }
    Ok((files > 0).then_some(report))
}

impl fmt::Display for TestReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tests, failures, errors, skipped, .. } = self;
        write!(f, "{tests} tests: {failures} failed, {errors} broke, {skipped} skipped")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(xml: &str) -> TestReport {
        let mut report = TestReport::default();
        report.add(xml.as_bytes()).unwrap();
        report
    }

    #[test]
    fn what_runners_write_is_read() {
        let report = read(
            r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="nextest-run" tests="99">
  <testsuite name="core" tests="3">
    <properties><property name="a" value="b"/></properties>
    <testcase name="passes" classname="core" time="0.5"><system-out>failure</system-out></testcase>
    <testcase name="fails &amp; tells" classname="core" time="1,000.25">
      <failure type="test failure" message="assertion `left == right`">thread &apos;x&apos; panicked
<![CDATA[left: <1>]]></failure>
      <system-err>noise</system-err>
    </testcase>
    <testcase name="skips"><skipped/></testcase>
  </testsuite>
  <testsuite name="web">
    <testsuite name="inner"><testcase name="breaks"><error message="no such host"/></testcase></testsuite>
    <testcase name="flaky"><flakyFailure message="once"/></testcase>
  </testsuite>
</testsuites>"#,
        );
        assert_eq!((report.tests, report.failures, report.errors, report.skipped), (5, 1, 1, 1));
        assert_eq!(report.duration_ms, 1_000_750);
        let [failed, broke] = report.failing.as_slice() else { panic!("{report:?}") };
        let expected = FailingTest {
            suite: "core".into(),
            class: "core".into(),
            name: "fails & tells".into(),
            kind: FailureKind::Failure,
            message: "assertion `left == right`".into(),
            text: "thread 'x' panicked\nleft: <1>".into(),
        };
        assert_eq!(failed, &expected);
        assert_eq!(
            (broke.suite.as_str(), broke.name.as_str(), broke.kind),
            ("inner", "breaks", FailureKind::Error)
        );
        assert_eq!(broke.message, "no such host");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(
            json["failing"][1],
            serde_json::json!({
                "suite": "inner", "name": "breaks", "kind": "error", "message": "no such host",
            })
        );
    }

    #[test]
    fn several_files_add_up_and_a_bad_one_adds_nothing() {
        let mut report = TestReport::default();
        let one = "<testsuite name='s'><testcase name='a'><failure/></testcase></testsuite>";
        report.add(one.as_bytes()).unwrap();
        report.add(one.as_bytes()).unwrap();
        assert_eq!((report.tests, report.failures, report.failing.len()), (2, 2, 2));
        let before = report.clone();
        let cut = &one[..one.len() - 20];
        let deep = format!("<testsuite>{}", "<a>".repeat(100));
        let bomb = "<!DOCTYPE x [<!ENTITY a \"aaaa\"><!ENTITY b \"&a;&a;\">]><testsuite name=\"&b;\"/>";
        for bad in ["", "no xml", "<html/>", cut, &deep, bomb, "<testsuite></wrong>"] {
            assert!(report.add(bad.as_bytes()).is_err(), "{bad}");
            assert_eq!(report, before, "{bad}");
        }
    }

    #[test]
    fn a_flood_is_bounded() {
        let long = "é".repeat(100_000);
        let case = format!("<testcase name='{long}'><failure message='{long}'>{long}</failure></testcase>");
        let xml = format!("<testsuite name='{long}'>{}</testsuite>", case.repeat(150));
        let report = read(&xml);
        assert_eq!((report.failures, report.failing.len()), (150, MAX_SHOWN));
        let bounded = |case: &FailingTest| {
            case.name.len() <= 512 && case.message.len() <= 1024 && case.text.len() <= 4096
        };
        assert!(report.failing.iter().all(bounded));
        let odd = read(
            "<testsuite><testcase time='1e300'/><testcase time='-1'/><testcase time='NaN'/></testsuite>",
        );
        assert_eq!((odd.tests, odd.duration_ms), (3, 0));
    }
}
