//! Knows the folders that paths of people are relative to.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use sealci_guest::accounts::{LIMIT_BYTES, PASSWD};

/// Where the commands start, and what `~` stands for.
#[derive(Debug, Clone)]
pub struct Places {
    pub workdir: PathBuf,
    pub home: PathBuf,
}

impl Places {
    /// Reads `~`, `~/…`, an absolute path, or one below the working folder.
    pub fn resolve(&self, text: &[u8]) -> PathBuf {
        let (folder, rest) = self.split(text);
        // Joined with an empty path, a folder would get a slash at its end.
        if rest.is_empty() { folder.to_owned() } else { folder.join(std::ffi::OsStr::from_bytes(rest)) }
    }

    /// The folder that a path is relative to, and what it says below that.
    pub fn split<'a>(&self, text: &'a [u8]) -> (&Path, &'a [u8]) {
        match text {
            b"~" => (&self.home, b""),
            [b'~', b'/', rest @ ..] => (&self.home, trimmed(rest)),
            [b'/', ..] => (Path::new("/"), trimmed(text)),
            _ => (&self.workdir, text),
        }
    }
}

fn trimmed(mut path: &[u8]) -> &[u8] {
    while let [b'/', rest @ ..] = path {
        path = rest;
    }
    path
}

/// The home folder of a user, as `/etc/passwd` has it; `/` where it says nothing.
pub fn home_of(uid: u32) -> PathBuf {
    let passwd = read_accounts(PASSWD).unwrap_or_default();
    home_in(&passwd, uid).unwrap_or_else(|| PathBuf::from("/"))
}

/// The beginning of a file about users or groups. It may be an image's, and so anything.
pub fn read_accounts(path: &str) -> io::Result<Vec<u8>> {
    // A FIFO in its place is not waited for.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let mut bytes = Vec::new();
    if file.metadata()?.is_file() {
        file.take(LIMIT_BYTES).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// The sixth field of the first line whose third is `uid`; see passwd(5).
fn home_in(passwd: &[u8], uid: u32) -> Option<PathBuf> {
    let uid = uid.to_string();
    passwd.split(|byte| *byte == b'\n').find_map(|line| {
        let mut fields = line.split(|byte| *byte == b':').skip(2);
        (fields.next()? == uid.as_bytes()).then_some(())?;
        let home = fields.nth(2)?;
        home.starts_with(b"/").then(|| PathBuf::from(OsString::from_vec(home.to_vec())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_the_sixth_field() {
        let passwd = b"garbage\nroot:x:0:0:root:/root:/bin/sh\na:x:7:7::relative:\nb:x:7:7::/home/b:\nc:x:8:8\nroot2:x:0:0::/other:";
        assert_eq!(home_in(passwd, 0), Some("/root".into()));
        assert_eq!(home_in(passwd, 7), Some("/home/b".into()));
        for uid in [8, 9] {
            assert_eq!(home_in(passwd, uid), None);
        }
        assert_eq!(
            home_in(b"\xff:\xff:1:::/\xff", 1),
            Some(PathBuf::from(OsString::from_vec(b"/\xff".to_vec())))
        );
    }

    #[test]
    fn paths_are_read_as_people_mean_them() {
        let places = Places { workdir: "/w".into(), home: "/h".into() };
        for (text, path) in [
            ("", "/w"),
            ("a/b", "/w/a/b"),
            ("~", "/h"),
            ("~/", "/h"),
            ("~//c", "/h/c"),
            ("~user", "/w/~user"),
            ("/", "/"),
            ("//d", "/d"),
        ] {
            assert_eq!(places.resolve(text.as_bytes()), Path::new(path), "{text}");
        }
    }
}
