//! Decides which repository URLs are given to git, and in what form.

use std::fmt;

use percent_encoding::percent_decode_str;
use sealci_core::repository::{InvalidRepositoryUrl, RepositoryIdentity, redacted};

use crate::credentials::{Credentials, Secret};

/// Transports besides `https` and `ssh`, which are always allowed. Git's others (`git`, `ext`, …) never are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AllowedTransports {
    /// Without encryption: anyone on the way can change what is built.
    pub http: bool,
    /// Repositories on the service's own disk.
    pub file: bool,
}

/// How a repository is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Https,
    Http,
    Ssh,
    File,
}

impl Transport {
    /// The name that `GIT_ALLOW_PROTOCOL` knows.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Https => "https",
            Self::Http => "http",
            Self::Ssh => "ssh",
            Self::File => "file",
        }
    }
}

/// A repository URL that may be given to git. It holds no password: one that was written into the URL has become
/// [`RemoteUrl::embedded_credentials`].
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteUrl {
    text: String,
    transport: Transport,
    /// Host and port to connect to; none for `file`.
    authority: Option<(String, u16)>,
    identity: RepositoryIdentity,
    embedded: Credentials,
}

/// A text that is no repository URL, or one that is not allowed here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRemoteUrl {
    #[error(transparent)]
    NoRepository(#[from] InvalidRepositoryUrl),
    #[error(
        "`{url}` uses the transport `{transport}`, which is not allowed here; use https or ssh, or have it allowed in the service's configuration"
    )]
    NotAllowed { url: String, transport: String },
    #[error("`{url}` is no repository URL that git may be given: {why}")]
    Refused { url: String, why: &'static str },
}

impl RemoteUrl {
    /// Reads `https://`, `ssh://`, `user@host:path`, and, where allowed, `http://` and `file://`.
    pub fn parse(text: &str, allowed: &AllowedTransports) -> Result<Self, InvalidRemoteUrl> {
        let identity = RepositoryIdentity::of_url(text)?;
        if text.contains("://") {
            Self::of_url(text, allowed, identity)
        } else {
            Self::of_scp(text, identity)
        }
    }

    fn of_url(
        text: &str,
        allowed: &AllowedTransports,
        identity: RepositoryIdentity,
    ) -> Result<Self, InvalidRemoteUrl> {
        let refuse = |why| InvalidRemoteUrl::Refused { url: redacted(text), why };
        let mut url = url::Url::parse(text).map_err(|_| refuse("it cannot be parsed"))?;
        let (transport, default_port) = match url.scheme() {
            "https" => (Transport::Https, 443),
            "ssh" => (Transport::Ssh, 22),
            "http" if allowed.http => (Transport::Http, 80),
            "file" if allowed.file => (Transport::File, 0),
            other => {
                return Err(InvalidRemoteUrl::NotAllowed {
                    url: redacted(text),
                    transport: other.to_owned(),
                });
            }
        };
        if url.query().is_some() || url.fragment().is_some() {
            return Err(refuse("it has a query or a fragment"));
        }
        if transport == Transport::File {
            if url.host_str().is_some_and(|host| host != "localhost") {
                return Err(refuse("a file URL names no host: `file:///path`"));
            }
            let path = url.to_file_path().map_err(|()| refuse("it names no absolute path"))?;
            let path = path.to_str().ok_or_else(|| refuse("its path is not UTF-8"))?;
            // Git reads a file URL's path as it stands, without decoding.
            let text = format!("file://{path}");
            return Ok(Self { text, transport, authority: None, identity, embedded: Credentials::None });
        }
        let host = url.host_str().unwrap_or_default().to_owned();
        if host.is_empty() || host.starts_with('-') || url.username().starts_with('-') {
            return Err(refuse("a host or user cannot be empty or begin with `-`"));
        }
        let authority = Some((host, url.port().unwrap_or(default_port)));
        let mut embedded = Credentials::None;
        if transport == Transport::Ssh {
            if url.password().is_some() {
                return Err(refuse("ssh takes no password: use a deploy key"));
            }
        } else if !url.username().is_empty() || url.password().is_some() {
            let decoded = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
            embedded = Credentials::Token {
                username: decoded(url.username()),
                secret: Secret::new(decoded(url.password().unwrap_or_default())),
            };
            let cleared = url.set_password(None).and_then(|()| url.set_username(""));
            cleared.map_err(|()| refuse("its user cannot be separated from its host"))?;
        }
        Ok(Self { text: url.to_string(), transport, authority, identity, embedded })
    }

    /// `user@host:path`, which stays as it is: its path is relative to the user's home, other than an `ssh://` URL's.
    fn of_scp(text: &str, identity: RepositoryIdentity) -> Result<Self, InvalidRemoteUrl> {
        let refuse = |why| InvalidRemoteUrl::Refused { url: redacted(text), why };
        let (authority, path) = text.split_once(':').ok_or_else(|| refuse("it names no host"))?;
        let (user, host) = authority.split_once('@').unwrap_or(("", authority));
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if [user, host, path].iter().any(|part| part.starts_with('-')) {
            return Err(refuse("user, host or path begins with `-`"));
        }
        if host.is_empty() || !host.chars().all(plain) || !user.chars().all(plain) {
            return Err(refuse(
                "it has unusual characters in its user or host: use the form `ssh://user@host/path`",
            ));
        }
        Ok(Self {
            text: text.to_owned(),
            transport: Transport::Ssh,
            authority: Some((host.to_owned(), 22)),
            identity,
            embedded: Credentials::None,
        })
    }

    /// The URL as given to git, without any password.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn transport(&self) -> Transport {
        self.transport
    }

    pub fn identity(&self) -> &RepositoryIdentity {
        &self.identity
    }

    /// User and password that were written into the URL.
    pub fn embedded_credentials(&self) -> &Credentials {
        &self.embedded
    }

    pub(crate) fn authority(&self) -> Option<(&str, u16)> {
        self.authority.as_ref().map(|(host, port)| (host.as_str(), *port))
    }
}

impl fmt::Display for RemoteUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redacted(&self.text))
    }
}

impl fmt::Debug for RemoteUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redacted(&self.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: AllowedTransports = AllowedTransports { http: true, file: true };
    const DEFAULT: AllowedTransports = AllowedTransports { http: false, file: false };

    #[test]
    fn https_and_ssh_are_always_allowed_and_the_rest_where_told() {
        for good in ["https://h/o/r.git", "ssh://git@h:2222/o/r", "git@h:o/r.git", "h:o/r"] {
            assert!(RemoteUrl::parse(good, &DEFAULT).is_ok(), "{good}");
        }
        for conditional in ["http://h/o/r", "file:///srv/git/r"] {
            let refused = RemoteUrl::parse(conditional, &DEFAULT).unwrap_err();
            assert!(matches!(refused, InvalidRemoteUrl::NotAllowed { .. }), "{refused}");
            assert!(RemoteUrl::parse(conditional, &ALL).is_ok(), "{conditional}");
        }
    }

    #[test]
    fn what_git_could_mistake_for_something_else_is_refused() {
        for bad in [
            "--upload-pack=touch /tmp/x",
            "-oProxyCommand=x:y",
            "ext::sh -c x",
            "ext://x/y",
            "git://h/o/r",
            "ssh://-oProxyCommand=x/y",
            "ssh://-x@h/y",
            "git@-h:o/r",
            "git@h:-o/r",
            "h$(x):o/r",
            "https://h/o/r?x=y",
            "https://h/o/r#x",
            "file://elsewhere/srv/git",
            "/srv/git/r",
            "ssh://git:password@h/o/r",
        ] {
            assert!(RemoteUrl::parse(bad, &ALL).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_password_leaves_the_url_and_becomes_a_credential() {
        let url = RemoteUrl::parse("https://me:hunter%32@h/o/r.git", &DEFAULT).unwrap();
        assert_eq!(url.as_str(), "https://h/o/r.git");
        let expected = Credentials::Token { username: "me".into(), secret: Secret::new("hunter2") };
        assert_eq!(url.embedded_credentials(), &expected);
        assert!(!format!("{url} {url:?}").contains("hunter"));
        assert_eq!(RemoteUrl::parse("ssh://git@h/o/r", &DEFAULT).unwrap().as_str(), "ssh://git@h/o/r");
    }
}
