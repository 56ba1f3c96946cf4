//! The command `faults`: causes every fault of `tests/tests/faults`, at the periods that are shipped too, and writes down what
//! came of each, in docs/faults.md.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{test, workspace};

/// Between these the page is written by this command.
const BEGIN: &str = "<!-- Written by `cargo xtask faults`: begin -->";
const END: &str = "<!-- Written by `cargo xtask faults`: end -->";

/// Most of the time is waiting for periods to pass, so some may wait at once.
const AT_ONCE: &str = "--test-threads=3";

/// Runs the tests that these names occur in, or all; whether all passed. Only a whole run is written down.
pub fn run(names: &[&str]) -> Result<bool> {
    test::prepare_machine();
    let rows_file = std::env::temp_dir().join(format!("sealci-faults-{}", std::process::id()));
    let _ = fs::remove_file(&rows_file);
    let build = workspace::cargo().args(["build", "--locked", "--bin", "sealci"]).status()?;
    if !build.success() {
        bail!("the binary does not build");
    }
    let begun = Instant::now();
    let status = workspace::cargo()
        .args([
            "test",
            "--locked",
            "-p",
            "sealci-tests",
            "--test",
            "faults",
            "--",
            "--include-ignored",
            AT_ONCE,
        ])
        .args(names)
        .env("SEALCI_FAULTS", &rows_file)
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo test")?;
    let rows = read_rows(&rows_file)?;
    let section = show(&rows);
    println!("\n{section}\ntook {:.0} s", begun.elapsed().as_secs_f64());
    let count = count_tests(names)?;
    if rows.len() != count {
        bail!("{count} tests left {} rows: one of them ended before it began", rows.len());
    }
    if names.is_empty() {
        write(&section)?;
    }
    Ok(status.success() && rows.iter().all(|row| row.result != "FAILED"))
}

/// What a test wrote down.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    fault: String,
    periods: String,
    how: String,
    passes_when: String,
    figure: String,
    result: String,
}

fn read_rows(file: &PathBuf) -> Result<Vec<Row>> {
    let text = fs::read_to_string(file).context("no test wrote a row")?;
    fs::remove_file(file)?;
    let mut rows = text.lines().map(read_row).collect::<Result<Vec<Row>>>()?;
    rows.sort();
    Ok(rows)
}

fn read_row(line: &str) -> Result<Row> {
    let row: Value = serde_json::from_str(line).context("a row is no JSON")?;
    let cell = |name: &str| row[name].as_str().unwrap_or_default().replace('|', "\\|").replace('\n', " ");
    Ok(Row {
        fault: cell("fault"),
        periods: cell("periods"),
        how: cell("how"),
        passes_when: cell("passes_when"),
        figure: cell("figure"),
        result: cell("result"),
    })
}

fn show(rows: &[Row]) -> String {
    let mut text =
        "| fault | how | periods | passes when | figure | result |\n|---|---|---|---|---|---|\n".to_owned();
    for Row { fault, periods, how, passes_when, figure, result } in rows {
        text += &format!("| {fault} | {how} | {periods} | {passes_when} | {figure} | {result} |\n");
    }
    text
}

/// How many tests there are of these names: none may be missing without a word.
fn count_tests(names: &[&str]) -> Result<usize> {
    let output = workspace::cargo()
        .args(["test", "--locked", "--quiet", "-p", "sealci-tests", "--test", "faults", "--", "--list"])
        .args(names)
        .output()
        .context("cannot list the tests")?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.ends_with(": test")).count())
}

fn write(section: &str) -> Result<()> {
    let path = workspace::root().join("docs/faults.md");
    let page = fs::read_to_string(&path)?;
    fs::write(&path, replaced(&page, section)?)?;
    println!("written to {}", path.display());
    Ok(())
}

fn replaced(page: &str, section: &str) -> Result<String> {
    let (before, rest) =
        page.split_once(BEGIN).with_context(|| format!("docs/faults.md has no `{BEGIN}`"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("docs/faults.md has no `{END}`"))?;
    Ok(format!("{before}{BEGIN}\n\n{section}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_section_is_replaced() {
        let page = format!("above\n{BEGIN}\nold\n{END}\nbelow\n");
        let new = replaced(&page, "new\n").unwrap();
        assert_eq!(new, format!("above\n{BEGIN}\n\nnew\n\n{END}\nbelow\n"));
        assert_eq!(replaced(&new, "new\n").unwrap(), new);
        assert!(replaced("nothing", "new").is_err());
    }

    #[test]
    fn a_row_cannot_break_the_table() {
        let row = read_row(r#"{"fault":"f","how":"a | b","figure":"x\ny","result":"passed"}"#).unwrap();
        assert_eq!(show(&[row]).lines().last(), Some("| f | a \\| b |  |  | x y | passed |"));
    }
}
