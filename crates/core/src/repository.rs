//! Tells whether two URLs mean the same repository.

use std::fmt;

/// A repository's identity: its configured URL without scheme, user, default port and `.git` (I4). Two events whose
/// repositories have the same identity can be the same event.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RepositoryIdentity(String);

/// A text that names no repository we could reach.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{url}` is no repository URL: {why}")]
pub struct InvalidRepositoryUrl {
    url: String,
    why: &'static str,
}

impl RepositoryIdentity {
    /// Reads a URL (`https://`, `http://`, `ssh://`, `git://`, `file://`) or git's short ssh form (`user@host:path`).
    ///
    /// Whether the scheme is allowed is decided where git is run, not here.
    pub fn of_url(text: &str) -> Result<Self, InvalidRepositoryUrl> {
        let refuse = |why| InvalidRepositoryUrl { url: redacted(text), why };
        if text.len() > 2048 {
            return Err(refuse("longer than 2,048 bytes"));
        }
        if text.starts_with('-') {
            return Err(refuse("it begins with `-`"));
        }
        if text.chars().any(char::is_control) {
            return Err(refuse("it has control characters"));
        }
        let (host, path) = if text.contains("://") {
            let url = url::Url::parse(text).map_err(|_| refuse("it cannot be parsed"))?;
            let default_port = match url.scheme() {
                "https" | "http" => None, // the parser leaves those out itself
                "ssh" => Some(22),
                "git" => Some(9418),
                "file" => None,
                _ => return Err(refuse("only https, http, ssh, git and file are known")),
            };
            let host = match (url.host_str(), url.port()) {
                (Some(host), Some(port)) if Some(port) != default_port => {
                    format!("{}:{port}", host.to_lowercase())
                }
                (Some(host), _) => host.to_lowercase(),
                (None, _) if url.scheme() == "file" => String::new(),
                (None, _) => return Err(refuse("it names no host")),
            };
            (host, url.path().to_owned())
        } else {
            let (host, path) =
                text.split_once(':').ok_or_else(|| refuse("it has neither a scheme nor a host"))?;
            let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
            if host.is_empty() || host.contains('/') || path.starts_with(':') {
                return Err(refuse("it has neither a scheme nor a host"));
            }
            (host.to_lowercase(), path.to_owned())
        };
        let path = path.trim_matches('/');
        let path = path.strip_suffix(".git").unwrap_or(path).trim_end_matches('/');
        if path.is_empty() {
            return Err(refuse("it names no path"));
        }
        Ok(Self(format!("{host}/{path}")))
    }

    /// `forge.example.org/owner/repo`; for a local path, `/srv/git/repo`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The URL without user and password, for errors and pages: what stands before `@` in the authority is left out.
pub fn redacted(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(scheme, rest)| (scheme, rest));
    let end_of_authority = rest.find('/').unwrap_or(rest.len());
    let start = rest[..end_of_authority].rfind('@').map_or(0, |at| at + 1);
    let rest: String = rest[start..].chars().take(200).collect();
    if scheme.is_empty() { rest } else { format!("{scheme}://{rest}") }
}

impl fmt::Display for RepositoryIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RepositoryIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(url: &str) -> String {
        RepositoryIdentity::of_url(url).unwrap().as_str().to_owned()
    }

    #[test]
    fn scheme_user_default_port_and_suffix_do_not_matter() {
        for url in [
            "https://forge.example.org/owner/repo.git",
            "https://user:secret@forge.example.org/owner/repo",
            "https://Forge.Example.org:443/owner/repo/",
            "ssh://git@forge.example.org:22/owner/repo.git",
            "git@forge.example.org:owner/repo.git",
            "http://forge.example.org/owner/repo",
        ] {
            assert_eq!(identity(url), "forge.example.org/owner/repo", "{url}");
        }
    }

    #[test]
    fn another_port_host_or_path_is_another_repository() {
        assert_eq!(
            identity("https://forge.example.org:8443/owner/repo"),
            "forge.example.org:8443/owner/repo"
        );
        assert_eq!(identity("file:///srv/git/repo.git"), "/srv/git/repo");
        assert_ne!(
            identity("https://forge.example.org/owner/Repo"),
            identity("https://forge.example.org/owner/repo")
        );
    }

    #[test]
    fn what_is_no_repository_is_refused_and_passwords_are_not_repeated() {
        for url in [
            "",
            "-u/x:y",
            "ext::sh -c x",
            "https://",
            "https://host/",
            "ftp://h/p",
            "nothing",
            "/srv/git/x",
            "a\nb:c",
        ] {
            assert!(RepositoryIdentity::of_url(url).is_err(), "{url}");
        }
        let error = RepositoryIdentity::of_url("ftp://user:hunter2@host/p").unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
    }
}
