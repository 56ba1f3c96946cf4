//! Unpacks an artifact's archive below a folder, and nowhere else, whatever the archive says.
//!
//! Every folder on the way to a file is opened by itself, from the one above it, and never through a link: so neither `..`,
//! nor an absolute name, nor a link that the archive or somebody else has put there leads out.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat};
use sealci_archive::relative_name;
use sha2::{Digest, Sha256};
use tar::EntryType;

/// Why an archive was not unpacked to its end.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("cannot use the folder {0}")]
    Root(String, #[source] io::Error),
    #[error("the download broke off or is damaged")]
    Read(#[source] io::Error),
    #[error("the archive holds `{0}`, which leads out of its folder; nothing after it is unpacked")]
    LeadsOut(String),
    #[error("cannot write `{0}`")]
    Write(String, #[source] io::Error),
    #[error("the archive holds more than it says")]
    TooMuch,
    #[error("what came has another digest than the server says")]
    WrongDigest,
}

/// What an archive says of itself.
#[derive(Debug, Clone)]
pub struct Said<'a> {
    pub digest: &'a str,
    pub files: u64,
    pub unpacked_bytes: u64,
}

/// What came of an archive.
#[derive(Debug, PartialEq, Eq)]
pub struct Unpacked {
    pub files: u64,
    /// Symbolic links that lead out of the folder, which are not made: `name -> target`. The first of them.
    pub left_out: Vec<String>,
}

/// How many of those are named.
const MOST_NAMED: usize = 20;

/// Unpacks the entries that are wanted.
pub fn unpack(
    archive: impl Read,
    said: &Said<'_>,
    root: &Path,
    is_wanted: impl Fn(&str) -> bool,
) -> Result<Unpacked, UnpackError> {
    let unusable = |error| UnpackError::Root(root.display().to_string(), error);
    std::fs::create_dir_all(root).map_err(unusable)?;
    let root: OwnedFd = File::open(root).map_err(unusable)?.into();
    let mut archive = Hashed { inner: archive, hash: Sha256::new() };
    let mut decoder = zstd::Decoder::new(&mut archive).map_err(UnpackError::Read)?;
    decoder.window_log_max(23).map_err(UnpackError::Read)?;
    let mut tar = tar::Archive::new(&mut decoder);
    let (mut files, mut unpacked, mut seen, mut left_out) = (0, 0_u64, 0_u64, Vec::new());
    for entry in tar.entries().map_err(UnpackError::Read)? {
        let mut entry = entry.map_err(UnpackError::Read)?;
        let shown = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some(name) = relative_name(&shown) else { return Err(UnpackError::LeadsOut(shown)) };
        if name.is_empty() {
            continue;
        }
        seen += 1;
        unpacked = unpacked.saturating_add(entry.size());
        if seen > said.files || unpacked > said.unpacked_bytes {
            return Err(UnpackError::TooMuch);
        }
        if is_wanted(&name) {
            match put(root.as_fd(), &name, &mut entry)? {
                Put::Done => files += u64::from(!entry.header().entry_type().is_dir()),
                Put::LeadsOut(link) if left_out.len() < MOST_NAMED => left_out.push(link),
                Put::LeadsOut(_) => {}
            }
        }
    }
    io::copy(&mut decoder, &mut io::sink()).map_err(UnpackError::Read)?;
    drop(decoder);
    // The index and what a reader had no need of.
    io::copy(&mut archive, &mut io::sink()).map_err(UnpackError::Read)?;
    if archive.digest() == said.digest {
        Ok(Unpacked { files, left_out })
    } else {
        Err(UnpackError::WrongDigest)
    }
}

/// Copies an archive as it is; fails if it is another one.
pub fn copy(archive: impl Read, digest: &str, to: &mut impl Write) -> Result<u64, UnpackError> {
    let mut archive = Hashed { inner: archive, hash: Sha256::new() };
    let length = io::copy(&mut archive, to).map_err(UnpackError::Read)?;
    if archive.digest() == digest { Ok(length) } else { Err(UnpackError::WrongDigest) }
}

struct Hashed<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.hash.update(&buffer[..length]);
        Ok(length)
    }
}

impl<R> Hashed<R> {
    fn digest(self) -> String {
        self.hash.finalize().iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
    }
}

const FOLDER: OFlag =
    OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// What became of an entry.
enum Put {
    Done,
    /// A link that is not made.
    LeadsOut(String),
}

fn put<R: Read>(root: BorrowedFd<'_>, name: &str, entry: &mut tar::Entry<'_, R>) -> Result<Put, UnpackError> {
    let fail = |error: io::Error| UnpackError::Write(name.to_owned(), error);
    let (folders, last) = name.rsplit_once('/').unwrap_or(("", name));
    let parent = folder(root, folders).map_err(fail)?;
    let target = |entry: &tar::Entry<'_, R>| {
        entry.link_name_bytes().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    };
    match entry.header().entry_type() {
        EntryType::Directory => drop(folder(root, name).map_err(fail)?),
        EntryType::Regular | EntryType::Continuous => {
            let mode = entry.header().mode().unwrap_or(0o644);
            write(parent.as_fd(), last, mode, entry).map_err(fail)?;
        }
        EntryType::Symlink => {
            let target = target(entry);
            if !stays_inside(folders, &target) {
                return Ok(Put::LeadsOut(format!("{name} -> {target}")));
            }
            make_way(parent.as_fd(), last).map_err(fail)?;
            symlinkat(target.as_str(), &parent, last).map_err(|error| fail(error.into()))?;
        }
        EntryType::Link => {
            let target = target(entry);
            let Some(inside) = relative_name(&target).filter(|target| !target.is_empty()) else {
                return Err(UnpackError::LeadsOut(format!("{name} -> {target}")));
            };
            let (folders, file) = inside.rsplit_once('/').unwrap_or(("", &inside));
            let from = folder(root, folders).map_err(fail)?;
            make_way(parent.as_fd(), last).map_err(fail)?;
            linkat(&from, file, &parent, last, AtFlags::empty()).map_err(|error| fail(error.into()))?;
        }
        _ => return Err(fail(io::Error::other("it is neither file, folder nor link"))),
    }
    Ok(Put::Done)
}

/// Writes one file below a folder; fails if it has another length.
pub fn put_file(root: &Path, name: &str, mode: u32, length: u64, from: impl Read) -> Result<(), UnpackError> {
    let unusable = |error| UnpackError::Root(root.display().to_string(), error);
    let Some(name) = relative_name(name).filter(|name| !name.is_empty()) else {
        return Err(UnpackError::LeadsOut(name.to_owned()));
    };
    std::fs::create_dir_all(root).map_err(unusable)?;
    let root: OwnedFd = File::open(root).map_err(unusable)?.into();
    let fail = |error: io::Error| UnpackError::Write(name.clone(), error);
    let (folders, last) = name.rsplit_once('/').unwrap_or(("", &name));
    let parent = folder(root.as_fd(), folders).map_err(fail)?;
    let mut from = from.take(length.saturating_add(1));
    let written = write(parent.as_fd(), last, mode, &mut from).map_err(fail)?;
    if written == length {
        return Ok(());
    }
    make_way(parent.as_fd(), last).map_err(fail)?;
    Err(UnpackError::Read(io::Error::other("it has another length than the server says")))
}

fn write(parent: BorrowedFd<'_>, name: &str, mode: u32, from: &mut impl Read) -> io::Result<u64> {
    // Neither setuid nor setgid; and always ours to read, write and remove.
    let mode = Mode::from_bits_truncate(mode & 0o777 | 0o600);
    make_way(parent, name)?;
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut file = File::from(openat(parent, name, flags, mode)?);
    io::copy(from, &mut file)
}

/// Opens the folder of this name, and makes what is missing of it.
fn folder(root: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let mut folder = root.try_clone_to_owned()?;
    for part in name.split('/').filter(|part| !part.is_empty()) {
        match mkdirat(&folder, part, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        folder = openat(&folder, part, FOLDER, Mode::empty())?;
    }
    Ok(folder)
}

/// Removes the file or link that is there; a folder stays, and is in the way.
fn make_way(parent: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether a link in this folder names something below the root.
fn stays_inside(folders: &str, target: &str) -> bool {
    if target.is_empty() || target.starts_with('/') {
        return false;
    }
    let mut depth = folders.split('/').filter(|part| !part.is_empty()).count();
    for part in target.split('/').filter(|part| !part.is_empty() && *part != ".") {
        match (part, depth) {
            ("..", 0) => return false,
            ("..", _) => depth -= 1,
            _ => depth += 1,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive of entries as they are written, with what it says of itself.
    fn archive(entries: &[(EntryType, &str, &str)]) -> (Vec<u8>, String) {
        let mut tar = tar::Builder::new(Vec::new());
        for (kind, name, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_mode(0o4755);
            let bytes = if *kind == EntryType::Regular { content.as_bytes() } else { b"" };
            if !matches!(kind, EntryType::Regular | EntryType::Directory) {
                header.set_link_name_literal(content).unwrap();
            }
            header.set_size(bytes.len() as u64);
            header.set_cksum();
            tar.append(&header, bytes).unwrap();
        }
        let packed = zstd::encode_all(&tar.into_inner().unwrap()[..], 3).unwrap();
        let digest = Hashed { inner: (), hash: Sha256::new_with_prefix(&packed) }.digest();
        (packed, digest)
    }

    fn unpacked(entries: &[(EntryType, &str, &str)], root: &Path) -> Result<Unpacked, UnpackError> {
        let (bytes, digest) = archive(entries);
        let said = Said { digest: &digest, files: entries.len() as u64, unpacked_bytes: 1000 };
        unpack(&bytes[..], &said, root, |_| true)
    }

    use EntryType::{Directory, Link, Regular, Symlink};

    #[test]
    fn files_folders_and_links_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let entries = [
            (Directory, "a/", ""),
            (Regular, "a/b/c", "text"),
            (Symlink, "a/link", "b/../b/c"),
            (Link, "hard", "a/b/c"),
        ];
        for _ in ["at first", "over what is there"] {
            assert_eq!(unpacked(&entries, folder.path()).unwrap().files, 3);
            for name in ["a/b/c", "a/link", "hard"] {
                assert_eq!(std::fs::read_to_string(folder.path().join(name)).unwrap(), "text", "{name}");
            }
        }
        let mode = std::os::unix::fs::MetadataExt::mode(&folder.path().join("a/b/c").metadata().unwrap());
        assert_eq!(mode & 0o7700, 0o700, "no setuid");
    }

    #[test]
    fn nothing_leads_out() {
        let folder = tempfile::tempdir().unwrap();
        let (root, outside) = (folder.path().join("root"), folder.path().join("outside"));
        std::fs::create_dir_all(&root).unwrap();
        std::fs::create_dir(&outside).unwrap();
        let outside_text = outside.to_str().unwrap();
        for entries in [
            &[(Regular, "../outside/x", "x")][..],
            &[(Regular, "/tmp/x", "x")],
            &[(Link, "l", "../outside")],
            &[(Link, "l", "/etc/passwd")],
        ] {
            let refused = unpacked(entries, &root).unwrap_err();
            assert!(matches!(refused, UnpackError::LeadsOut(_)), "{refused}");
        }
        // A link that leads out is left out and told; the rest comes.
        for target in ["..", outside_text, "a/../../outside", ""] {
            let entries = [(Symlink, "l", target), (Regular, "beside", "x")];
            let expected = Unpacked { files: 1, left_out: vec![format!("l -> {target}")] };
            assert_eq!(unpacked(&entries, &root).unwrap(), expected);
            assert!(std::fs::symlink_metadata(root.join("l")).is_err());
        }
        // A link that was there before, and one inside that an entry would go through.
        std::os::unix::fs::symlink(&outside, root.join("there")).unwrap();
        for entries in [&[(Regular, "there/x", "x")][..], &[(Symlink, "in", "sub"), (Regular, "in/x", "x")]] {
            assert!(matches!(unpacked(entries, &root).unwrap_err(), UnpackError::Write(..)));
        }
        assert_eq!(unpacked(&[(Regular, "there", "x")], &root).unwrap().files, 1, "a link is replaced");
        for (name, length) in [("../x", 1), ("/tmp/x", 1), ("way/x", 1), ("x", 2)] {
            std::os::unix::fs::symlink(&outside, root.join("way")).ok();
            assert!(put_file(&root, name, 0o644, length, &b"x"[..]).is_err(), "{name}");
        }
        put_file(&root, "a/x", 0o4711, 1, &b"x"[..]).unwrap();
        assert!(!root.join("x").exists(), "half a file is none");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn an_archive_that_lies_is_found_out() {
        let folder = tempfile::tempdir().unwrap();
        let (bytes, digest) = archive(&[(Regular, "a", "text"), (Regular, "b", "text")]);
        let with = |digest: &str, files: u64, unpacked_bytes: u64| {
            unpack(&bytes[..], &Said { digest, files, unpacked_bytes }, folder.path(), |name| name == "a")
        };
        assert_eq!(with(&digest, 2, 8).unwrap().files, 1, "only what is wanted");
        assert!(!folder.path().join("b").exists());
        assert!(matches!(with(&digest, 1, 8).unwrap_err(), UnpackError::TooMuch));
        assert!(matches!(with(&digest, 2, 7).unwrap_err(), UnpackError::TooMuch));
        assert!(matches!(with("sha256:0", 2, 8).unwrap_err(), UnpackError::WrongDigest));
        let cut = unpack(
            &bytes[..bytes.len() - 5],
            &Said { digest: &digest, files: 2, unpacked_bytes: 8 },
            folder.path(),
            |_| true,
        );
        assert!(cut.is_err());
    }
}
