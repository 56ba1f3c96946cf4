//! Knows which credentials open which repository, from a file that names other files: the secrets themselves never stand
//! in it.
//!
//! Invariants:
//! - credentials are given for the repository or the folder of repositories they are written down for, never for another
//!   host, and never over another transport: a token for `https` is not shown to who answers on `http`;
//! - all is read at once, so that what is missing is known when a service starts.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sealci_core::repository::{InvalidRepositoryUrl, RepositoryIdentity, redacted};
use serde::Deserialize;

use crate::credentials::{Credentials, Secret, SshKey};

/// Forges take any user name beside a token.
const ANY_USERNAME: &str = "git";

/// Credentials by repository.
#[derive(Clone, Default)]
pub struct CredentialBook {
    entries: Vec<Entry>,
}

#[derive(Clone)]
struct Entry {
    transport: String,
    /// A repository's identity, or that of the folder of repositories it stands for.
    scope: RepositoryIdentity,
    credentials: Credentials,
}

/// Why a file of credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialBookError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} cannot be understood; docs/repositories.md shows what it should look like", path.display())]
    Malformed { path: PathBuf, source: serde_json::Error },
    #[error("{}: entry {number} names no repository", path.display())]
    Url { path: PathBuf, number: usize, source: InvalidRepositoryUrl },
    #[error("{}: entry {number}, {url}: {why}", path.display())]
    Entry { path: PathBuf, number: usize, url: String, why: &'static str },
    #[error("{}: entry {number}, {url}: {} holds no secret", path.display(), secret.display())]
    Empty { path: PathBuf, number: usize, url: String, secret: PathBuf },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    repositories: Vec<FileEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntry {
    url: String,
    username: Option<String>,
    token_file: Option<PathBuf>,
    ssh_key_file: Option<PathBuf>,
}

impl CredentialBook {
    /// Reads the file and those that it names; relative ones are beside it.
    pub fn from_file(path: &Path) -> Result<Self, CredentialBookError> {
        let text = read(path)?;
        let file: File = serde_json::from_str(&text)
            .map_err(|source| CredentialBookError::Malformed { path: path.to_owned(), source })?;
        let entries = file.repositories.into_iter().enumerate();
        let entries: Result<_, _> = entries.map(|(index, entry)| entry.read(path, index + 1)).collect();
        Ok(Self { entries: entries? })
    }

    /// What opens a repository: the entry that is written for the most of its address. None: it is public.
    pub fn of(&self, url: &str) -> Credentials {
        let Ok(identity) = RepositoryIdentity::of_url(url) else { return Credentials::None };
        let transport = transport_of(url);
        let fits = |entry: &&Entry| entry.transport == transport && is_within(&identity, &entry.scope);
        let found = self.entries.iter().filter(fits).max_by_key(|entry| entry.scope.as_str().len());
        found.map_or(Credentials::None, |entry| entry.credentials.clone())
    }
}

impl fmt::Debug for CredentialBook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|entry| &entry.scope)).finish()
    }
}

impl FileEntry {
    fn read(self, path: &Path, number: usize) -> Result<Entry, CredentialBookError> {
        let scope = RepositoryIdentity::of_url(&self.url).map_err(|source| CredentialBookError::Url {
            path: path.to_owned(),
            number,
            source,
        })?;
        let transport = transport_of(&self.url);
        let url = redacted(&self.url);
        let refuse =
            |why| CredentialBookError::Entry { path: path.to_owned(), number, url: url.clone(), why };
        let secret = |name: &Path| {
            let name = path.parent().unwrap_or(Path::new("")).join(name);
            let text = read(&name)?;
            if text.trim().is_empty() {
                let path = path.to_owned();
                return Err(CredentialBookError::Empty { path, number, url: url.clone(), secret: name });
            }
            Ok(text)
        };
        let credentials = match (transport.as_str(), &self.token_file, &self.ssh_key_file) {
            ("https" | "http", Some(file), None) => Credentials::Token {
                username: self.username.unwrap_or_else(|| ANY_USERNAME.to_owned()),
                secret: Secret::new(secret(file)?.trim()),
            },
            ("ssh", None, Some(file)) if self.username.is_none() => {
                Credentials::SshKey(SshKey::Text(Secret::new(secret(file)?)))
            }
            ("https" | "http", _, _) => return Err(refuse("https takes a `token_file`")),
            ("ssh", _, _) => return Err(refuse("ssh takes an `ssh_key_file`, and the user in the URL")),
            _ => return Err(refuse("only https and ssh have credentials")),
        };
        Ok(Entry { transport, scope, credentials })
    }
}

fn read(path: &Path) -> Result<String, CredentialBookError> {
    fs::read_to_string(path).map_err(|source| CredentialBookError::Read { path: path.to_owned(), source })
}

/// Of `user@host:path` it is ssh.
fn transport_of(url: &str) -> String {
    url.split_once("://").map_or("ssh".to_owned(), |(scheme, _)| scheme.to_lowercase())
}

fn is_within(repository: &RepositoryIdentity, scope: &RepositoryIdentity) -> bool {
    let rest = repository.as_str().strip_prefix(scope.as_str());
    // A scope ends where a name ends, and nothing climbs out of it.
    rest.is_some_and(|rest| {
        rest.is_empty() || (rest.starts_with('/') && !rest.split('/').any(|part| part == ".."))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(folder: &Path, text: &str) -> Result<CredentialBook, CredentialBookError> {
        let path = folder.join("repositories.json");
        fs::write(&path, text).unwrap();
        CredentialBook::from_file(&path)
    }

    fn token(username: &str, secret: &str) -> Credentials {
        Credentials::Token { username: username.into(), secret: Secret::new(secret) }
    }

    #[test]
    fn the_narrowest_entry_opens_a_repository_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("team", "t-secret\n"), ("one", "o-secret"), ("key", "-----BEGIN\nx\n")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let book = book(
            folder.path(),
            r#"{"repositories": [
                {"url": "https://forge.test/team/", "token_file": "team"},
                {"url": "https://forge.test/team/one.git", "username": "me", "token_file": "one"},
                {"url": "git@forge.test:team/one.git", "ssh_key_file": "key"}
            ]}"#,
        )
        .unwrap();
        assert_eq!(book.of("https://forge.test/team/two.git"), token("git", "t-secret"));
        assert_eq!(book.of("https://FORGE.test/team/one"), token("me", "o-secret"));
        let key = Credentials::SshKey(SshKey::Text(Secret::new("-----BEGIN\nx\n")));
        assert_eq!(book.of("ssh://git@forge.test/team/one.git"), key);
        for other in [
            "http://forge.test/team/two",
            "https://forge.test/teams/two",
            "https://forge.test:8443/team/two",
            "https://forge.test/other/two",
            "https://forge.test.evil.test/team/two",
            "https://forge.test/team/%2e%2e/other",
            "git@forge.test:team/two",
            "git@forge.test:team/one/../../other",
            "file:///team/two",
            "nonsense",
        ] {
            assert_eq!(book.of(other), Credentials::None, "{other}");
        }
        assert!(!format!("{book:?}").contains("secret"));
    }

    #[test]
    fn what_cannot_work_is_refused_and_no_secret_repeated() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("token"), "hunter2").unwrap();
        fs::write(folder.path().join("empty"), "\n").unwrap();
        for (entry, said) in [
            (r#"{"url": "https://h/o", "token_file": "none"}"#, "cannot read"),
            (r#"{"url": "https://h/o", "token_file": "empty"}"#, "no secret"),
            (r#"{"url": "https://h/o", "ssh_key_file": "token"}"#, "token_file"),
            (r#"{"url": "https://h/o"}"#, "token_file"),
            (r#"{"url": "git@h:o", "token_file": "token"}"#, "ssh_key_file"),
            (r#"{"url": "file:///o", "token_file": "token"}"#, "only https and ssh"),
            (r#"{"url": "https://h/", "token_file": "token"}"#, "names no repository"),
            (r#"{"url": "https://h/o", "token": "hunter2"}"#, "cannot be understood"),
        ] {
            let error = book(folder.path(), &format!(r#"{{"repositories": [{entry}]}}"#)).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(said) && !format!("{error:?}").contains("hunter2"), "{entry}: {text}");
        }
    }
}
