//! Builds git's environment: what a call may reach, and nothing else.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::process::Command;

use crate::address::Pinned;
use crate::credentials::{Credentials, SshKey};
use crate::process::{self, Bounds, RunError};
use crate::url::{RemoteUrl, Transport};

/// How git is run on this machine.
#[derive(Debug, Clone)]
pub struct Options {
    /// The program, looked up in `PATH` of [`Options::environment`] unless it is a path.
    pub program: PathBuf,
    /// A folder of our own that is git's and ssh's `HOME`: it holds nothing but the known hosts.
    pub home: PathBuf,
    /// What git's environment holds besides our settings: `PATH`, and proxies if there are any.
    pub environment: Vec<(OsString, OsString)>,
    /// Certificates to trust for `https` instead of the system's, in PEM format.
    pub tls_ca: Option<PathBuf>,
    /// Host keys to trust for `ssh`. Without it, a host's first key is remembered in [`Options::home`].
    pub known_hosts: Option<PathBuf>,
    /// Lets repository URLs lead to loopback, link-local and metadata addresses.
    pub allow_local_addresses: bool,
    pub limits: Limits,
}

/// What a call may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Time for listing a repository's refs, and for reading from a mirror.
    pub query_timeout: Duration,
    /// Time for fetching into a mirror.
    pub fetch_timeout: Duration,
    /// Time for writing a workspace.
    pub checkout_timeout: Duration,
    pub max_refs: usize,
    /// What one mirror may hold on disk.
    pub max_mirror_bytes: u64,
    /// What one checked-out tree may hold on disk.
    pub max_workspace_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            query_timeout: Duration::from_secs(30),
            fetch_timeout: Duration::from_secs(600),
            checkout_timeout: Duration::from_secs(300),
            max_refs: 100_000,
            max_mirror_bytes: 4 << 30,
            max_workspace_bytes: 10 << 30,
        }
    }
}

impl Options {
    /// The usual options, with the parts of this process's environment that git needs.
    pub fn new(home: impl Into<PathBuf>) -> Self {
        const KEPT: [&str; 10] = [
            "PATH",
            "http_proxy",
            "https_proxy",
            "HTTPS_PROXY",
            "all_proxy",
            "ALL_PROXY",
            "no_proxy",
            "NO_PROXY",
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
        ];
        let kept = |name: &str| Some((OsString::from(name), std::env::var_os(name)?));
        Self {
            program: PathBuf::from("git"),
            home: home.into(),
            environment: KEPT.into_iter().filter_map(kept).collect(),
            tls_ca: None,
            known_hosts: None,
            allow_local_addresses: false,
            limits: Limits::default(),
        }
    }

    /// The program's path. Looked up once and not at every call: only a path is started without a copy of this whole
    /// process (vfork(2)). As it is named where it is not found, so that the call's error says that.
    fn found_program(&self) -> PathBuf {
        let path = self.environment.iter().find(|(name, _)| name == "PATH");
        let is_program = |candidate: &PathBuf| {
            std::fs::metadata(candidate)
                .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
        };
        path.filter(|_| self.program.components().count() == 1)
            .and_then(|(_, path)| {
                std::env::split_paths(path).map(|folder| folder.join(&self.program)).find(is_program)
            })
            .unwrap_or_else(|| self.program.clone())
    }
}

/// The git command line, ready to be called. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Git {
    options: Arc<Options>,
}

impl Git {
    /// Makes the home folder if it is missing; nobody else can read it.
    pub fn new(mut options: Options) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&options.home)?;
        options.program = options.found_program();
        Ok(Self { options: Arc::new(options) })
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    pub fn limits(&self) -> &Limits {
        &self.options.limits
    }

    /// A call that needs no server.
    pub(crate) fn local(&self) -> Call<'_> {
        let mut call = Call {
            command: Command::new(&self.options.program),
            settings: Vec::new(),
            credentials: None,
            key_file: None,
            git: self,
        };
        call.command.env_clear().envs(self.options.environment.iter().map(|(name, value)| (name, value)));
        for (name, value) in ENVIRONMENT {
            call.command.env(name, value);
        }
        call.command.env("HOME", &self.options.home).env("XDG_CONFIG_HOME", &self.options.home);
        call.settings.extend(SETTINGS.iter().map(|(key, value)| ((*key).to_owned(), OsString::from(value))));
        // Where git starts decides nothing: every call names its repository.
        call.command.current_dir(&self.options.home);
        call
    }

    /// A call that talks to a repository's server, at the pinned addresses.
    pub(crate) fn remote<'a>(
        &'a self,
        url: &RemoteUrl,
        credentials: &'a Credentials,
        pinned: Option<&Pinned>,
    ) -> io::Result<Call<'a>> {
        let mut call = self.local();
        call.command.env("GIT_ALLOW_PROTOCOL", url.transport().name());
        match url.transport() {
            Transport::Https | Transport::Http => self.speak_http(&mut call, url, credentials, pinned),
            Transport::Ssh => self.speak_ssh(&mut call, credentials, pinned)?,
            Transport::File => {}
        }
        call.credentials = Some(credentials);
        Ok(call)
    }

    fn speak_http(
        &self,
        call: &mut Call<'_>,
        url: &RemoteUrl,
        credentials: &Credentials,
        pinned: Option<&Pinned>,
    ) {
        if let Some(authorization) = credentials.basic_authorization() {
            // Bound to the URL, so that it is shown to no other server.
            call.set(format!("http.{}.extraHeader", url.as_str()), format!("Authorization: {authorization}"));
        }
        if let Some(ca) = &self.options.tls_ca {
            call.set("http.sslCAInfo", ca);
        }
        if let Some(Pinned { host, port, addresses }) = pinned {
            let addresses: Vec<String> = addresses
                .iter()
                .map(|ip| if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() })
                .collect();
            call.set("http.curloptResolve", format!("{host}:{port}:{}", addresses.join(",")));
        }
    }

    fn speak_ssh(
        &self,
        call: &mut Call<'_>,
        credentials: &Credentials,
        pinned: Option<&Pinned>,
    ) -> io::Result<()> {
        let mut words: Vec<String> = ["ssh", "-F", "/dev/null"].map(str::to_owned).to_vec();
        let mut option = |text: String| words.extend(["-o".to_owned(), text]);
        for fixed in [
            "BatchMode=yes",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "ForwardAgent=no",
            "ForwardX11=no",
            "ClearAllForwardings=yes",
            "PermitLocalCommand=no",
            "ConnectTimeout=20",
            "ServerAliveInterval=15",
            "ServerAliveCountMax=4",
        ] {
            option(fixed.to_owned());
        }
        if let Some(known_hosts) = &self.options.known_hosts {
            option("StrictHostKeyChecking=yes".to_owned());
            option(format!("UserKnownHostsFile={}", quoted_for_ssh(known_hosts)?));
        } else {
            option("StrictHostKeyChecking=accept-new".to_owned());
            option(format!("UserKnownHostsFile={}", quoted_for_ssh(&self.options.home.join("known_hosts"))?));
        }
        if let Some(Pinned { host, addresses, .. }) = pinned
            && let Some(address) = addresses.first()
        {
            option(format!("HostName={address}"));
            option(format!("HostKeyAlias={host}"));
        }
        let key = match credentials {
            Credentials::SshKey(SshKey::File(path)) => Some(path.clone()),
            Credentials::SshKey(SshKey::Text(text)) => {
                let mut file = tempfile::Builder::new().prefix("key-").tempfile_in(&self.options.home)?;
                let line_end = if text.expose().ends_with('\n') { "" } else { "\n" };
                io::Write::write_all(&mut file, format!("{}{line_end}", text.expose()).as_bytes())?;
                let path = file.into_temp_path();
                let copy = path.to_path_buf();
                call.key_file = Some(path);
                Some(copy)
            }
            Credentials::None | Credentials::Token { .. } => None,
        };
        match key {
            Some(key) => option(format!("IdentityFile={}", quoted_for_ssh(&key)?)),
            None => option("IdentityFile=none".to_owned()),
        }
        let command: Vec<String> = words.iter().map(|word| quoted_for_shell(word)).collect();
        call.command.env("GIT_SSH_COMMAND", command.join(" ")).env("GIT_SSH_VARIANT", "ssh");
        Ok(())
    }
}

/// What git reads from its environment, in every call.
const ENVIRONMENT: [(&str, &str); 11] = [
    ("LC_ALL", "C"),
    ("GIT_CONFIG_NOSYSTEM", "1"),
    ("GIT_CONFIG_GLOBAL", "/dev/null"),
    ("GIT_ATTR_NOSYSTEM", "1"),
    ("GIT_TERMINAL_PROMPT", "0"),
    ("GIT_ASKPASS", "/bin/false"),
    ("GIT_OPTIONAL_LOCKS", "0"),
    ("GIT_NO_REPLACE_OBJECTS", "1"),
    ("GIT_LITERAL_PATHSPECS", "1"),
    ("GIT_NO_LAZY_FETCH", "1"),
    // Nothing may be reached unless a call says what.
    ("GIT_ALLOW_PROTOCOL", "none"),
];

/// Git's configuration in every call; it stands above whatever a repository's own says.
const SETTINGS: [(&str, &str); 26] = [
    ("core.hooksPath", "/dev/null"),
    ("core.fsmonitor", "false"),
    ("core.attributesFile", "/dev/null"),
    ("core.excludesFile", "/dev/null"),
    ("core.protectHFS", "true"),
    ("core.protectNTFS", "true"),
    ("core.symlinks", "true"),
    ("core.sparseCheckout", "false"),
    ("core.autocrlf", "false"),
    ("credential.helper", ""),
    ("http.followRedirects", "false"),
    ("http.lowSpeedLimit", "1"),
    ("http.lowSpeedTime", "60"),
    ("submodule.recurse", "false"),
    ("fetch.recurseSubmodules", "false"),
    ("transfer.bundleURI", "false"),
    ("gc.autoDetach", "false"),
    ("maintenance.autoDetach", "false"),
    // What is fetched is checked, and paths that leave the tree are refused. Old mistakes of harmless kinds, which
    // well-known repositories have in their history, are let through.
    ("fetch.fsckObjects", "true"),
    ("fetch.fsck.hasDot", "error"),
    ("fetch.fsck.hasDotdot", "error"),
    ("fetch.fsck.hasDotgit", "error"),
    ("fetch.fsck.zeroPaddedFilemode", "ignore"),
    ("fetch.fsck.missingSpaceBeforeDate", "ignore"),
    ("fetch.fsck.badTimezone", "ignore"),
    ("fetch.fsck.missingSpaceBeforeEmail", "ignore"),
];

/// One call of git being put together.
pub(crate) struct Call<'a> {
    command: Command,
    settings: Vec<(String, OsString)>,
    credentials: Option<&'a Credentials>,
    /// Removed when the call is over.
    key_file: Option<tempfile::TempPath>,
    git: &'a Git,
}

impl Call<'_> {
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn without_env(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    /// Takes back one of our settings, so that the user's own counts.
    pub fn without_setting(mut self, key: &str) -> Self {
        self.settings.retain(|(setting, _)| setting != key);
        self
    }

    fn set(&mut self, key: impl Into<String>, value: impl Into<OsString>) {
        self.settings.push((key.into(), value.into()));
    }

    /// A call about a repository without a working tree.
    pub fn git_dir(self, folder: &Path) -> Self {
        self.env("GIT_DIR", folder)
    }

    /// Bounds for a call that only reads.
    pub fn query_bounds(&self, max_output_bytes: usize) -> Bounds {
        Bounds { timeout: self.git.limits().query_timeout, max_output_bytes, growth: None }
    }

    /// Runs it; `stdin` is fed to git.
    pub async fn run(mut self, stdin: &[u8], bounds: &Bounds) -> Result<Vec<u8>, RunError> {
        // Settings go by the environment: a command line can be read by every user of the machine.
        self.command.env("GIT_CONFIG_COUNT", self.settings.len().to_string());
        for (index, (key, value)) in self.settings.iter().enumerate() {
            self.command.env(format!("GIT_CONFIG_KEY_{index}"), key);
            self.command.env(format!("GIT_CONFIG_VALUE_{index}"), value);
        }
        let credentials = self.credentials;
        let redact = |text: &str| credentials.map_or_else(|| text.to_owned(), |known| known.redact(text));
        let result = process::run(self.command, stdin, bounds, redact).await;
        drop(self.key_file);
        result
    }
}

/// A word for the shell to which git gives `GIT_SSH_COMMAND`.
fn quoted_for_shell(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A path as a value in ssh's configuration, where blanks separate, `%` begins an escape and `${` a variable.
fn quoted_for_ssh(path: &Path) -> io::Result<String> {
    let text = path.to_str().filter(|text| !text.contains(['"', '\n', '\\']) && !text.contains("${"));
    let text = text.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("ssh cannot be given the path {}: it has quotes, `${{` or is not UTF-8", path.display()),
        )
    })?;
    Ok(format!("\"{}\"", text.replace('%', "%%")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::Secret;
    use crate::url::AllowedTransports;

    fn call_of(url: &str, credentials: &Credentials) -> (Vec<String>, Vec<(String, String)>) {
        let home = tempfile::tempdir().unwrap();
        let git = Git::new(Options::new(home.path())).unwrap();
        let url = RemoteUrl::parse(url, &AllowedTransports::default()).unwrap();
        let pinned = Pinned { host: "h".into(), port: 443, addresses: vec!["2001:db8::1".parse().unwrap()] };
        let call = git.remote(&url, credentials, Some(&pinned)).unwrap();
        let text = |text: &OsStr| text.to_string_lossy().into_owned();
        let std = call.command.as_std();
        let args = std.get_args().map(text).collect();
        let mut env: Vec<_> =
            std.get_envs().filter_map(|(name, value)| Some((text(name), text(value?)))).collect();
        env.extend(call.settings.iter().map(|(key, value)| (key.clone(), text(value))));
        (args, env)
    }

    #[test]
    fn a_token_goes_by_the_environment_and_only_to_its_url() {
        let token = Credentials::Token { username: "git".into(), secret: Secret::new("hunter2") };
        let (args, env) = call_of("https://h/o/r.git", &token);
        assert!(args.is_empty());
        let header = env.iter().find(|(name, _)| name == "http.https://h/o/r.git.extraHeader").unwrap();
        assert!(header.1.starts_with("Authorization: Basic "));
        assert!(env.contains(&("http.curloptResolve".into(), "h:443:[2001:db8::1]".into())));
        assert!(env.contains(&("GIT_ALLOW_PROTOCOL".into(), "https".into())));
    }

    #[test]
    fn a_key_goes_by_a_private_file_that_the_ssh_command_names() {
        let key = Credentials::SshKey(SshKey::File("/keys/it's 1".into()));
        let (_, env) = call_of("git@h:o/r.git", &key);
        let (_, ssh) = env.iter().find(|(name, _)| name == "GIT_SSH_COMMAND").unwrap();
        assert!(ssh.contains(r#"'IdentityFile="/keys/it'\''s 1"'"#), "{ssh}");
        assert!(ssh.contains("'BatchMode=yes'") && ssh.contains("'HostKeyAlias=h'"), "{ssh}");
        assert!(quoted_for_ssh(Path::new("/a\"b")).is_err());
    }
}
