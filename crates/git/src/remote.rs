//! Asks a repository's server: which refs there are, at which revisions.

use std::collections::HashMap;
use std::io;

use sealci_core::event::{RefName, Revision};

use crate::address::{self, AddressError, Pinned};
use crate::command::{Call, Git};
use crate::credentials::Credentials;
use crate::process::RunError;
use crate::url::RemoteUrl;

/// A repository on a server, and what opens it.
#[derive(Debug, Clone)]
pub struct Remote {
    pub url: RemoteUrl,
    pub credentials: Credentials,
}

impl Remote {
    /// With the given credentials, or, without any, those written into the URL.
    pub fn new(url: RemoteUrl, credentials: Credentials) -> Self {
        let credentials = match credentials {
            Credentials::None => url.embedded_credentials().clone(),
            given => given,
        };
        Self { url, credentials }
    }
}

/// A branch or tag, and the commit it leads to: for an annotated tag the commit, not the tag's own object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteRef {
    pub name: RefName,
    pub revision: Revision,
}

/// Why a repository's server gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    #[error("{url}: not connected to")]
    Address { url: String, source: AddressError },
    #[error("{url}: the credentials cannot be used")]
    Credentials { url: String, source: io::Error },
    #[error(
        "{url}: the server refuses the credentials, or asks for some; check what `--repositories` names for it: {message}"
    )]
    Authentication { url: String, message: String },
    #[error(
        "{url}: the server's host key is not a known one, so nothing was shown to it; once you are sure that the key is the server's own, put it into the known hosts (docs/repositories.md): {message}"
    )]
    HostKey { url: String, message: String },
    #[error("{url}: the server knows no such repository, or not for these credentials: {message}")]
    NotFound { url: String, message: String },
    #[error(
        "{url}: the server's certificate is of no trusted authority, so nothing was shown to it; if it is of your own, name that with `--git-ca` (docs/repositories.md): {message}"
    )]
    Certificate { url: String, message: String },
    #[error(
        "{url}: the server redirects elsewhere, which is not followed: configure the URL it redirects to (often the same with `.git` at its end): {message}"
    )]
    Redirected { url: String, message: String },
    #[error("{url}: the server cannot be reached or does not answer properly: {message}")]
    Unreachable { url: String, message: String },
    #[error("{url}: more than {max_refs} branches and tags")]
    TooManyRefs { url: String, max_refs: usize },
    #[error("{url}: git could not do it")]
    Git { url: String, source: RunError },
}

impl RemoteError {
    /// Sorts a failed call by what git said, which is in English as `LC_ALL` is `C`.
    pub(crate) fn of(url: &RemoteUrl, source: RunError) -> Self {
        let RunError::Failed { message, .. } = &source else {
            return Self::Git { url: url.to_string(), source };
        };
        let says = |parts: &[&str]| parts.iter().any(|part| message.contains(part));
        // The first `fatal:` line is the cause; the lines after it advise people.
        let cause = message.lines().find_map(|line| line.trim().strip_prefix("fatal: "));
        // Of ssh git says no more than that it could not read; what ssh itself said stands before.
        let of_ssh = message.lines().map(str::trim).find(|line| {
            ["Permission denied (", "host key is known for", "Host key verification failed"]
                .iter()
                .any(|part| line.contains(part))
        });
        let told = of_ssh.or(cause).unwrap_or(message);
        let (url, message) = (url.to_string(), told.chars().take(500).collect());
        if says(&["Host key verification failed"]) {
            Self::HostKey { url, message }
        } else if says(&[
            "could not read Username",
            "could not read Password",
            "Authentication failed",
            "error: 401",
            "error: 403",
            "Permission denied (",
        ]) {
            Self::Authentication { url, message }
        } else if says(&["certificate verification failed", "server verification failed", "SSL certificate"])
        {
            Self::Certificate { url, message }
        } else if says(&["error: 301", "error: 302", "error: 303", "error: 307", "error: 308"]) {
            Self::Redirected { url, message }
        } else if says(&[
            "error: 404",
            "' not found",
            "not appear to be a git repository",
            "Repository not found",
            "does not exist",
        ]) {
            Self::NotFound { url, message }
        } else if says(&[
            "unable to access",
            "unable to connect",
            "Could not resolve",
            "Connection",
            "hung up",
            "early EOF",
            "RPC failed",
        ]) {
            Self::Unreachable { url, message }
        } else {
            Self::Git { url, source }
        }
    }
}

impl Git {
    /// Where the URL's host may be connected to: checked and pinned, unless local addresses are allowed.
    pub(crate) async fn pin(&self, url: &RemoteUrl) -> Result<Option<Pinned>, RemoteError> {
        if self.options().allow_local_addresses {
            return Ok(None);
        }
        let within = tokio::time::timeout(self.limits().query_timeout, address::pin(url));
        let pinned = within.await.unwrap_or_else(|_| {
            let host = url.authority().map_or("", |(host, _)| host).to_owned();
            Err(AddressError::Unresolved { host, source: io::ErrorKind::TimedOut.into() })
        });
        pinned.map_err(|source| RemoteError::Address { url: url.to_string(), source })
    }

    /// A call to the remote's server.
    pub(crate) fn call_to<'a>(
        &'a self,
        remote: &'a Remote,
        pinned: Option<&Pinned>,
    ) -> Result<Call<'a>, RemoteError> {
        self.remote(&remote.url, &remote.credentials, pinned)
            .map_err(|source| RemoteError::Credentials { url: remote.url.to_string(), source })
    }

    /// Lists the repository's branches and tags.
    ///
    /// A ref whose name or revision is not of the usual form is left out: it could not be built anyhow.
    pub async fn ls_remote(&self, remote: &Remote) -> Result<Vec<RemoteRef>, RemoteError> {
        /// What a line takes at most, generously: a commit id and a name of 1,024 bytes, peeled as well.
        const BYTES_PER_REF: usize = 512;
        let max_refs = self.limits().max_refs;
        let pinned = self.pin(&remote.url).await?;
        let call = self.call_to(remote, pinned.as_ref())?;
        let call = call.args(["ls-remote", "--quiet", "--heads", "--tags", "--", remote.url.as_str()]);
        let bounds = call.query_bounds((max_refs * BYTES_PER_REF).max(1 << 20));
        let listing = match call.run(b"", &bounds).await {
            Ok(listing) => listing,
            Err(RunError::TooMuchOutput { .. }) => {
                return Err(RemoteError::TooManyRefs { url: remote.url.to_string(), max_refs });
            }
            Err(source) => return Err(RemoteError::of(&remote.url, source)),
        };
        let refs = parse_listing(&listing);
        if refs.len() > max_refs {
            return Err(RemoteError::TooManyRefs { url: remote.url.to_string(), max_refs });
        }
        Ok(refs)
    }

    /// The branch that the repository's `HEAD` names, and its newest commit; none in an empty repository.
    pub async fn default_branch(&self, remote: &Remote) -> Result<Option<RemoteRef>, RemoteError> {
        let pinned = self.pin(&remote.url).await?;
        let call = self.call_to(remote, pinned.as_ref())?;
        let call = call.args(["ls-remote", "--quiet", "--symref", "--", remote.url.as_str(), "HEAD"]);
        let bounds = call.query_bounds(1 << 16);
        let listing = call.run(b"", &bounds).await.map_err(|source| RemoteError::of(&remote.url, source))?;
        Ok(parse_head(&listing))
    }
}

/// Reads `ref: <branch> TAB HEAD` and `<commit id> TAB HEAD`.
fn parse_head(listing: &[u8]) -> Option<RemoteRef> {
    let listing = std::str::from_utf8(listing).ok()?;
    let before_head = || listing.lines().filter_map(|line| line.strip_suffix("\tHEAD"));
    let name = before_head().find_map(|text| text.strip_prefix("ref: ")?.parse().ok())?;
    let revision = before_head().find_map(|text| text.parse().ok())?;
    Some(RemoteRef { name, revision })
}

/// Reads `<object id> TAB <ref>` lines. An annotated tag has a second line, its name ending in `^{}`, with the commit.
fn parse_listing(listing: &[u8]) -> Vec<RemoteRef> {
    let mut refs: Vec<RemoteRef> = Vec::new();
    let mut place_of: HashMap<RefName, usize> = HashMap::new();
    for line in listing.split(|byte| *byte == b'\n') {
        let Some((id, name)) = std::str::from_utf8(line).ok().and_then(|line| line.split_once('\t')) else {
            continue;
        };
        let name = name.strip_suffix("^{}").unwrap_or(name);
        let (Ok(revision), Ok(name)) = (id.parse::<Revision>(), name.parse::<RefName>()) else {
            continue;
        };
        match place_of.get(&name) {
            Some(place) => refs[*place].revision = revision,
            None => {
                place_of.insert(name.clone(), refs.len());
                refs.push(RemoteRef { name, revision });
            }
        }
    }
    refs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_names_the_default_branch() {
        let id = "a".repeat(40);
        let found = parse_head(format!("ref: refs/heads/trunk\tHEAD\n{id}\tHEAD\n").as_bytes()).unwrap();
        assert_eq!((found.name.as_str(), found.revision.as_str()), ("refs/heads/trunk", id.as_str()));
        assert_eq!(parse_head(b""), None);
    }

    #[test]
    fn annotated_tags_are_peeled_and_strange_lines_left_out() {
        let id = |digit: &str| digit.repeat(40);
        let listing = format!(
            "{a}\trefs/heads/main\n{b}\trefs/tags/v1\n{c}\trefs/tags/v1^{{}}\nnonsense\n{a}\trefs/heads/..\nshort\trefs/heads/x\n\n\u{0}\t\u{0}\n",
            a = id("a"),
            b = id("b"),
            c = id("c"),
        );
        let refs: Vec<_> = parse_listing(listing.as_bytes())
            .into_iter()
            .map(|found| (found.name.to_string(), found.revision.to_string()))
            .collect();
        assert_eq!(refs, [("refs/heads/main".into(), id("a")), ("refs/tags/v1".into(), id("c"))]);
    }
}
