//! The commands about artifacts: `artifact list`, `artifact download`, `artifact delete`.

use std::io::{self, Read};
use std::num::NonZeroU32;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::Args;
use futures_util::{Stream, TryStreamExt};
use jiff::Timestamp;
use sealci_api::controller::types::{Artifact, ArtifactFile, ArtifactFileKind, ArtifactKind};
use serde::Serialize;
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::connect::{Server, ServerArgs};
use crate::exit::{Exit, Failure};
use crate::format;
use crate::output;
use crate::terminal::{Terminal, one_line};
use crate::unpack::{self, Said, UnpackError, Unpacked};

/// Pieces of a download that may wait for the disk.
const PIECES_AHEAD: usize = 16;
/// So many files are downloaded one by one; for more, the whole archive is quicker.
const FEW: usize = 16;
const FILES_A_PAGE: NonZeroU32 = NonZeroU32::new(10_000).unwrap();

#[derive(Debug, Args)]
pub struct ArtifactListArgs {
    /// The pipeline's number or id
    #[arg(value_name = "PIPELINE")]
    pipeline: String,
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct ArtifactDownloadArgs {
    /// The pipeline's number or id
    #[arg(value_name = "PIPELINE")]
    pipeline: String,
    /// Only these files and folders [default: all]
    #[arg(value_name = "PATH", conflicts_with = "archive")]
    paths: Vec<String>,
    /// Only this action's, right in the folder [default: all actions', each in a folder of its name]
    #[arg(long, value_name = "ACTION")]
    action: Option<String>,
    /// Where to put them
    #[arg(long = "output", short, value_name = "DIR", default_value = ".")]
    output_dir: PathBuf,
    /// Keep them packed, as ACTION.tar.zst
    #[arg(long)]
    archive: bool,
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct ArtifactDeleteArgs {
    /// The artifacts' ids, as `sealci artifact list` shows them
    #[arg(value_name = "ID", required = true)]
    ids: Vec<Uuid>,
    #[command(flatten)]
    server: ServerArgs,
}

/// An artifact that is here now.
#[derive(Debug, Serialize)]
struct Downloaded {
    action: String,
    to: String,
    files: u64,
    /// Links that lead out of the folder.
    left_out: Vec<String>,
}

pub async fn list(args: ArtifactListArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    let artifacts = of_pipeline(&server, &args.pipeline).await?;
    args.output.print(&artifacts, || {
        if artifacts.is_empty() {
            return "no artifacts\n".into();
        }
        let now = Timestamp::now();
        let rows: Vec<_> = artifacts.iter().map(|artifact| row(artifact, now)).collect();
        format::table(&["ACTION", "WHAT", "FILES", "UNPACKED", "PACKED", "MADE", "ID"], &rows, terminal)
    })?;
    Ok(Exit::Passed)
}

fn row(artifact: &Artifact, now: Timestamp) -> Vec<String> {
    vec![
        artifact.action_name.clone(),
        what(artifact),
        artifact.files.to_string(),
        format::bytes(artifact.unpacked_bytes),
        format::bytes(artifact.size_bytes),
        format::ago(&artifact.created_at, now),
        artifact.id.to_string(),
    ]
}

fn what(artifact: &Artifact) -> String {
    match artifact.kind {
        ArtifactKind::Files => "files".into(),
        ArtifactKind::ServiceLog => format!("log of {}", artifact.name.as_deref().unwrap_or("a service")),
    }
}

pub async fn download(args: ArtifactDownloadArgs) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    let mut artifacts = of_pipeline(&server, &args.pipeline).await?;
    let actions: Vec<_> = artifacts.iter().map(|artifact| one_line(&artifact.action_name)).collect();
    if let Some(wanted) = &args.action {
        artifacts.retain(|one| one.action_name == *wanted || one.action_id.to_string() == *wanted);
    }
    if artifacts.is_empty() {
        let of = args.action.as_ref().map(|name| format!(" of `{}`", one_line(name))).unwrap_or_default();
        let failure = Failure::usage(format!("there are no artifacts{of}"));
        return Err(if actions.is_empty() {
            failure
        } else {
            failure.help(format!("there are some of: {}", actions.join(", ")))
        });
    }
    let mut downloaded = Vec::new();
    for artifact in &artifacts {
        let some = if args.paths.is_empty() { None } else { few(&server, artifact, &args).await? };
        downloaded.push(match some {
            Some(some) => some,
            None => one(&server, artifact, &args).await?,
        });
    }
    let found: u64 = downloaded.iter().map(|one| one.files).sum();
    if found == 0 && !args.paths.is_empty() {
        return Err(Failure::usage("no artifact holds what was asked for")
            .help("`sealci artifact download` without a path takes all files"));
    }
    args.output.print(&downloaded, || downloaded.iter().map(words).collect())?;
    Ok(Exit::Passed)
}

fn words(one: &Downloaded) -> String {
    let files = if one.files == 1 { "file" } else { "files" };
    let mut words = format!("{}: {} {files} in {}\n", one_line(&one.action), one.files, one.to);
    for link in &one.left_out {
        words.push_str(&format!("  left out, since it leads out of there: {}\n", one_line(link)));
    }
    words
}

/// Downloads one artifact, while it is unpacked.
async fn one(
    server: &Server,
    artifact: &Artifact,
    args: &ArtifactDownloadArgs,
) -> Result<Downloaded, Failure> {
    let response = match server.client.download_artifact().artifact_id(artifact.id).send().await {
        Ok(response) => response,
        Err(error) => return Err(server.failure(error).await),
    };
    let to = place(artifact, args);
    let shown = to.display().to_string();
    let (wanted, packed) = (args.paths.clone(), args.archive);
    let (digest, files, bytes) = (artifact.digest.clone(), artifact.files, artifact.unpacked_bytes);
    let unpacked = flow(server, response.into_inner_stream(), &shown, move |reader| {
        if packed {
            return save(reader, &digest, &to).map(|files| Unpacked { files, left_out: Vec::new() });
        }
        let said =
            Said { digest: &digest, files: files.unsigned_abs(), unpacked_bytes: bytes.unsigned_abs() };
        unpack::unpack(reader, &said, &to, |name| is_wanted(name, &wanted))
    })
    .await?;
    let Unpacked { files, left_out } = unpacked;
    Ok(Downloaded { action: artifact.action_name.clone(), to: shown, files, left_out })
}

/// Hands what comes to who works on it, on a thread of their own; `what` is what comes, for people.
async fn flow<T: Send + 'static>(
    server: &Server,
    mut stream: impl Stream<Item = reqwest::Result<Bytes>> + Unpin,
    what: &str,
    work: impl FnOnce(Pieces) -> Result<T, UnpackError> + Send + 'static,
) -> Result<T, Failure> {
    let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
    let working = tokio::task::spawn_blocking(move || work(Pieces { pieces, current: Bytes::new() }));
    let came = loop {
        let piece = match stream.try_next().await {
            Ok(Some(piece)) => Ok(piece),
            Ok(None) => break Ok(()),
            Err(error) => Err(error.to_string()),
        };
        let broken = piece.as_ref().err().cloned();
        // Who unpacks has given up, and says why.
        if sender.send(piece.map_err(io::Error::other)).await.is_err() {
            break Ok(());
        }
        if let Some(error) = broken {
            break Err(error);
        }
    };
    drop(sender);
    let done = working.await.map_err(|error| Failure::infrastructure(format!("unpacking ended: {error}")))?;
    if let Err(error) = came {
        return Err(Failure::infrastructure(format!("{}: the download broke off: {error}", server.url)));
    }
    done.map_err(|error| Failure::of_error(Exit::Infrastructure, what, &error))
}

/// Downloads the files that are wanted one by one, where they are few; none where they are not.
async fn few(
    server: &Server,
    artifact: &Artifact,
    args: &ArtifactDownloadArgs,
) -> Result<Option<Downloaded>, Failure> {
    let mut files: Vec<ArtifactFile> = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let mut request = server.client.list_artifact_files().artifact_id(artifact.id).limit(FILES_A_PAGE);
        if let Some(cursor) = &cursor {
            request = request.cursor(cursor);
        }
        let page = match request.send().await {
            Ok(page) => page.into_inner(),
            Err(error) => return Err(server.failure(error).await),
        };
        files.extend(page.files.into_iter().filter(|file| is_wanted(&file.path, &args.paths)));
        cursor = page.next;
        let are_plain = files.iter().all(|file| file.kind == ArtifactFileKind::File);
        if files.len() > FEW || !are_plain {
            return Ok(None);
        }
        if cursor.is_none() {
            break;
        }
    }
    let to = place(artifact, args);
    for file in &files {
        fetch(server, artifact, file, &to).await?;
    }
    let (action, to) = (artifact.action_name.clone(), to.display().to_string());
    Ok(Some(Downloaded { action, to, files: files.len() as u64, left_out: Vec::new() }))
}

async fn fetch(server: &Server, artifact: &Artifact, file: &ArtifactFile, to: &Path) -> Result<(), Failure> {
    let request = server.client.read_artifact_file().artifact_id(artifact.id).path(&file.path);
    let response = match request.send().await {
        Ok(response) => response,
        Err(error) => return Err(server.failure(error).await),
    };
    let (name, to, shown) = (file.path.clone(), to.to_owned(), one_line(&file.path));
    let (mode, length) = (file.mode.unsigned_abs(), file.size_bytes.unsigned_abs());
    flow(server, response.into_inner_stream(), &shown, move |reader| {
        unpack::put_file(&to, &name, mode, length, reader)
    })
    .await
}

/// Writes an archive as a file that appears whole.
fn save(reader: impl Read, digest: &str, to: &Path) -> Result<u64, UnpackError> {
    let fail = |error: io::Error| UnpackError::Write(to.display().to_string(), error);
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(fail)?;
    // As any file that a person makes, and not for them alone.
    let permissions = std::fs::Permissions::from_mode(0o666);
    let mut file = tempfile::Builder::new().permissions(permissions).tempfile_in(folder).map_err(fail)?;
    unpack::copy(reader, digest, &mut file)?;
    file.persist(to).map_err(|error| fail(error.error))?;
    Ok(1)
}

fn is_wanted(name: &str, wanted: &[String]) -> bool {
    wanted.is_empty()
        || wanted.iter().any(|path| {
            let path = path.trim_start_matches("./").trim_end_matches('/');
            name == path || name.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'))
        })
}

/// Where an artifact goes.
fn place(artifact: &Artifact, args: &ArtifactDownloadArgs) -> PathBuf {
    let mut name = file_name(&artifact.action_name);
    if let Some(service) = &artifact.name {
        name = format!("{name}.{}", file_name(service));
    }
    let is_alone = args.action.is_some() && artifact.kind == ArtifactKind::Files;
    match (args.archive, is_alone) {
        (true, _) => args.output_dir.join(format!("{name}.tar.zst")),
        (false, true) => args.output_dir.clone(),
        (false, false) => args.output_dir.join(name),
    }
}

/// Names of actions and services may hold what leads elsewhere.
fn file_name(name: &str) -> String {
    let plain: String = name.chars().map(|c| if c == '/' || c.is_control() { '_' } else { c }).collect();
    if plain.starts_with('.') { format!("_{plain}") } else { plain }
}

pub async fn delete(args: ArtifactDeleteArgs) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    for id in args.ids {
        if let Err(error) = server.client.delete_artifact().artifact_id(id).send().await {
            return Err(server.failure(error).await);
        }
        println!("{id}: deleted");
    }
    Ok(Exit::Passed)
}

async fn of_pipeline(server: &Server, pipeline: &str) -> Result<Vec<Artifact>, Failure> {
    let id = server.pipeline_id(pipeline).await?;
    match server.client.list_artifacts().pipeline_id(id).send().await {
        Ok(list) => Ok(list.into_inner().artifacts),
        Err(error) => Err(server.failure(error).await),
    }
}

/// A download, for who reads it on a thread of their own.
struct Pieces {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.current = piece?,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.current.len());
        buffer[..length].copy_from_slice(&self.current.split_to(length));
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_make_safe_folders() {
        for (name, safe) in [("test (a, b)", "test (a, b)"), ("../x", "_.._x"), ("..", "_.."), ("a/b", "a_b")]
        {
            assert_eq!(file_name(name), safe);
        }
    }

    #[test]
    fn a_path_means_a_file_or_all_below_it() {
        let wanted = ["./out/".to_owned(), "a.txt".to_owned()];
        assert!(is_wanted("out/x/y", &wanted) && is_wanted("out", &wanted) && is_wanted("a.txt", &wanted));
        assert!(!is_wanted("outside", &wanted) && !is_wanted("b/a.txt", &wanted));
        assert!(is_wanted("anything", &[]));
    }
}
