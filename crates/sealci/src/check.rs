//! The command `check`: reads manifests as the server would, without one.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use sealci_core::manifest::{self, ManifestErrors, ManifestSource};
use sealci_core::plan::Plan;
use serde::Serialize;

use crate::exit::{Exit, Failure};
use crate::output;
use crate::terminal::{Terminal, one_line};

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The repository: every file of its .sealci folder is read
    #[arg(value_name = "DIR", default_value = ".", conflicts_with = "file")]
    dir: PathBuf,
    /// One manifest
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    output: output::Args,
}

/// What was found out about one manifest.
#[derive(Debug, Serialize)]
struct Checked {
    file: String,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<Plan>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<manifest::ErrorView>,
    #[serde(skip)]
    refusal: Option<ManifestErrors>,
}

pub fn check(args: &CheckArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let files = match &args.file {
        Some(file) => vec![file.clone()],
        None => manifests_in(&args.dir)?,
    };
    let checked = files.iter().map(|file| check_file(file, &args.dir)).collect::<Result<Vec<_>, _>>()?;
    args.output.print(&checked, || checked.iter().map(|one| words(one, terminal)).collect())?;
    Ok(if checked.iter().all(|one| one.ok) { Exit::Passed } else { Exit::Usage })
}

/// The manifests of a repository, by name.
pub fn manifests_in(dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    let folder = dir.join(".sealci");
    let entries = fs::read_dir(&folder).map_err(|error| {
        Failure::of_error(Exit::Usage, format!("cannot read {}", folder.display()), &error)
            .help("manifests live in .sealci/*.yaml; name another with --file FILE")
    })?;
    let is_manifest =
        |path: &PathBuf| path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
    let mut files: Vec<_> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_manifest).collect();
    files.sort();
    if files.is_empty() {
        return Err(Failure::usage(format!("there is no manifest in {}", folder.display()))
            .help("write one, .sealci/pipeline.yaml, or name another with --file FILE"));
    }
    Ok(files)
}

fn check_file(file: &Path, dir: &Path) -> Result<Checked, Failure> {
    let text = fs::read(file)
        .map_err(|error| Failure::of_error(Exit::Usage, format!("cannot read {}", file.display()), &error))?;
    let name = file.strip_prefix(dir).unwrap_or(file).display().to_string();
    Ok(match manifest::parse(&ManifestSource { name: &name, text: &text }) {
        Ok(plan) => Checked { file: name, ok: true, plan: Some(plan), errors: Vec::new(), refusal: None },
        Err(errors) => {
            Checked { file: name, ok: false, plan: None, errors: errors.views(), refusal: Some(errors) }
        }
    })
}

fn words(checked: &Checked, terminal: Terminal) -> String {
    match (&checked.plan, &checked.refusal) {
        (Some(plan), _) => {
            let commands: usize = plan.actions.iter().map(|action| action.commands.len()).sum();
            let counted =
                |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
            format!(
                "{}: {} ({}, {})\n",
                one_line(&checked.file),
                terminal.green("ok"),
                counted(plan.actions.len(), "action"),
                counted(commands, "command"),
            )
        }
        (None, Some(errors)) => refusal(errors, terminal),
        (None, None) => String::new(),
    }
}

/// What is wrong with a manifest.
pub fn refusal(errors: &ManifestErrors, terminal: Terminal) -> String {
    if terminal.interactive { drawn(errors, terminal) } else { format!("{errors}\n") }
}

/// The errors drawn around their source.
fn drawn(errors: &ManifestErrors, terminal: Terminal) -> String {
    let theme = if terminal.colours {
        miette::GraphicalTheme::unicode()
    } else {
        miette::GraphicalTheme::unicode_nocolor()
    };
    let handler = miette::GraphicalReportHandler::new_themed(theme);
    let mut text = String::new();
    match handler.render_report(&mut text, errors.to_report().as_ref()) {
        Ok(()) => text,
        Err(_) => format!("{errors}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(manifest: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".sealci")).unwrap();
        fs::write(dir.path().join(".sealci/pipeline.yaml"), manifest).unwrap();
        dir
    }

    fn checked(manifest: &str) -> Checked {
        let dir = repository(manifest);
        check_file(&manifests_in(dir.path()).unwrap()[0], dir.path()).unwrap()
    }

    #[test]
    fn a_good_manifest_is_counted() {
        let checked = checked("name: x\nactions:\n  a:\n    commands: [\"true\", \"false\"]\n");
        assert_eq!(words(&checked, Terminal::PLAIN), ".sealci/pipeline.yaml: ok (1 action, 2 commands)\n");
    }

    #[test]
    fn a_bad_manifest_is_shown_with_its_place() {
        let checked = checked("name: x\nactions:\n  a:\n    comands: [\"true\"]\n");
        let plain = words(&checked, Terminal::PLAIN);
        assert!(plain.starts_with(".sealci/pipeline.yaml:"), "{plain}");
        assert!(plain.contains("comands"), "{plain}");
        let fancy = words(&checked, Terminal { interactive: true, colours: false });
        assert!(fancy.contains("comands") && !fancy.contains('\x1b'), "{fancy}");
        assert!(words(&checked, Terminal { interactive: true, colours: true }).contains('\x1b'));
        let json = serde_json::to_value(&checked).unwrap();
        assert_eq!(json["ok"], false);
        assert_eq!(json["errors"][0]["file"], ".sealci/pipeline.yaml");
    }

    #[test]
    fn a_folder_without_manifest_is_a_usage_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(manifests_in(dir.path()).unwrap_err().exit, Exit::Usage);
    }
}
