//! Finds the server and the token, makes the typed client, and turns what a server refuses into words and an exit code.

use std::fs;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use futures_util::TryStreamExt;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use sealci_api::controller::{ByteStream, Client, Error};
use sealci_service::problem::chain;
use serde::Deserialize;
use uuid::Uuid;

use crate::data_folder::{ClientFile, DataFolder};
use crate::exit::{Exit, Failure};
use crate::repos::{self, Monitor};
use crate::terminal::{Harmless, one_line};

/// Where the server is and who asks.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// The controller's address, https://ci.example.org [default: the server that `sealci up` runs here]
    #[arg(long, value_name = "URL", env = "SEALCI_SERVER")]
    pub server: Option<String>,
    /// The monitor's address, for `repo` [default: as --server]
    #[arg(long, value_name = "URL", env = "SEALCI_MONITOR")]
    pub monitor: Option<String>,
    /// A file that holds the token [default: $SEALCI_TOKEN, else the local server's]
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// The authority of the server's certificate, PEM [default: those that this system trusts]
    #[arg(long = "ca", alias = "ca-file", value_name = "FILE", env = "SEALCI_CA")]
    pub ca: Option<PathBuf>,
    /// The data folder of the local server [default: $XDG_DATA_HOME/sealci]
    #[arg(long, value_name = "DIR", env = "SEALCI_DATA")]
    pub data: Option<PathBuf>,
}

/// An address with the token for it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    url: String,
    token: Option<String>,
}

const NO_SERVER_HELP: &str =
    "start one with `sealci up`, or name one with --server URL and a token (--token-file, $SEALCI_TOKEN)";

/// Which of the servers is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Service {
    Controller,
    Monitor,
}

impl ServerArgs {
    /// A client of the controller.
    pub fn controller(&self) -> Result<Server, Failure> {
        Server::new(self.target(Service::Controller)?, self.ca.as_deref(), Client::new_with_client)
    }

    /// A client of the monitor.
    pub fn monitor(&self) -> Result<Monitor, Failure> {
        Server::new(self.target(Service::Monitor)?, self.ca.as_deref(), repos::client)
    }

    fn target(&self, service: Service) -> Result<Target, Failure> {
        let token = match &self.token_file {
            Some(path) => Some(fs::read_to_string(path).map_err(|error| {
                Failure::of_error(
                    Exit::Usage,
                    format!("cannot read the token file {}", path.display()),
                    &error,
                )
            })?),
            None => std::env::var("SEALCI_TOKEN").ok(),
        };
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let local = DataFolder::locate(self.data.as_deref())
            .and_then(|folder| folder.client_file())
            .or_else(|error| if self.server.is_some() { Ok(None) } else { Err(error) })
            .map_err(|error| Failure::of_error(Exit::Usage, "cannot find the local server", &error))?;
        let given = match service {
            Service::Controller => self.server.clone(),
            Service::Monitor => self.monitor.clone().or_else(|| self.server.clone()),
        };
        choose(service, given, token, local)
    }
}

/// The local server's token goes to the local server only.
fn choose(
    service: Service,
    given: Option<String>,
    token: Option<String>,
    local: Option<ClientFile>,
) -> Result<Target, Failure> {
    let local_url = |file: &ClientFile| match service {
        Service::Controller => file.controller.clone(),
        Service::Monitor => file.monitor.clone(),
    };
    let target = match (given, local) {
        (Some(url), local) => {
            let url = url.trim_end_matches('/').to_owned();
            let local = local.filter(|file| local_url(file) == url).map(|file| file.token);
            Target { url, token: token.or(local) }
        }
        (None, Some(file)) => Target { url: local_url(&file), token: token.or(Some(file.token)) },
        (None, None) => return Err(Failure::usage("no server is known").help(NO_SERVER_HELP)),
    };
    let parsed = reqwest::Url::parse(&target.url).map_err(|error| {
        Failure::usage(format!("the server's address `{}` is no URL: {error}", target.url))
    })?;
    match parsed.scheme() {
        "https" => {}
        "http" if target.token.is_none() || is_loopback(&parsed) => {}
        "http" => {
            return Err(Failure::usage(format!("the token would travel unencrypted to {}", target.url))
                .help("name the server with https://; plain http is for this machine only"));
        }
        _ => {
            return Err(Failure::usage(format!(
                "the server's address `{}` is neither http nor https",
                target.url
            )));
        }
    }
    Ok(target)
}

pub fn is_loopback(url: &reqwest::Url) -> bool {
    match url.host_str() {
        Some("localhost") => true,
        Some(host) => host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback()),
        None => false,
    }
}

/// A server that can be asked.
#[derive(Debug, Clone)]
pub struct Server<C = Client> {
    pub url: String,
    /// The typed client of its REST API.
    pub client: C,
}

impl Server {
    /// The controller that runs on this machine, whatever else the environment says.
    pub fn local(file: &ClientFile) -> Result<Self, Failure> {
        let target = Target { url: file.controller.clone(), token: Some(file.token.clone()) };
        Self::new(target, None, Client::new_with_client)
    }

    /// The id that a person's `7`, `#7` or full id means.
    pub async fn pipeline_id(&self, text: &str) -> Result<Uuid, Failure> {
        if let Ok(id) = text.parse::<Uuid>() {
            return Ok(id);
        }
        let number = text.trim_start_matches('#').parse::<NonZeroU64>().map_err(|_| {
            Failure::usage(format!("`{text}` is no pipeline"))
                .help("give its number or its id, as `sealci list` shows them")
        })?;
        let page = match self.client.list_pipelines().number(number).send().await {
            Ok(page) => page.into_inner(),
            Err(error) => return Err(self.failure(error).await),
        };
        page.pipelines.first().map(|pipeline| pipeline.id).ok_or_else(|| {
            Failure::usage(format!("there is no pipeline #{number} on {}", self.url))
                .help("`sealci list` shows those there are")
        })
    }
}

impl Monitor {
    /// The monitor that runs on this machine.
    pub fn local_monitor(file: &ClientFile) -> Result<Self, Failure> {
        let target = Target { url: file.monitor.clone(), token: Some(file.token.clone()) };
        Self::new(target, None, repos::client)
    }
}

impl<C> Server<C> {
    fn new(
        target: Target,
        ca_file: Option<&Path>,
        client: fn(&str, reqwest::Client) -> C,
    ) -> Result<Self, Failure> {
        let mut headers = HeaderMap::new();
        if let Some(token) = &target.token {
            let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                .map_err(|_| Failure::usage("the token holds characters that no token has"))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let mut builder = reqwest::Client::builder()
            .default_headers(headers)
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(Duration::from_secs(45))
            .redirect(reqwest::redirect::Policy::none());
        if target.url.starts_with("http://") {
            // Loopback: no proxy, and no need of the machine's certificate store, which a small image may lack.
            builder = builder.no_proxy().tls_certs_only([]);
        }
        // It alone: who runs an authority of their own wants no other to speak for their server.
        if let Some(path) = ca_file.filter(|_| target.url.starts_with("https://")) {
            let read =
                || -> anyhow::Result<_> { Ok(reqwest::Certificate::from_pem_bundle(&fs::read(path)?)?) };
            let certificates = read().map_err(|error| {
                Failure::usage(format!(
                    "cannot use the authority {}: {}",
                    path.display(),
                    chain(error.as_ref())
                ))
            })?;
            builder = builder.tls_certs_only(certificates);
        }
        let http = builder.build().map_err(|error| {
            Failure::of_error(Exit::Infrastructure, "cannot set up an HTTP client", &error)
        })?;
        Ok(Self { client: client(&target.url, http), url: target.url })
    }

    /// What the server's refusal means.
    pub async fn failure(&self, error: Error<ByteStream>) -> Failure {
        match error {
            Error::ErrorResponse(response) => {
                let status = response.status().as_u16();
                let mut stream = response.into_inner_stream();
                let mut body = Vec::new();
                while let Ok(Some(chunk)) = stream.try_next().await {
                    body.extend_from_slice(&chunk);
                    if body.len() > 4 << 20 {
                        break;
                    }
                }
                refused(&self.url, status, &body)
            }
            Error::UnexpectedResponse(response) => {
                let status = response.status().as_u16();
                refused(&self.url, status, &response.bytes().await.unwrap_or_default())
            }
            Error::CommunicationError(error) | Error::ResponseBodyError(error) => self.unreachable(&error),
            Error::InvalidRequest(message) => {
                Failure::usage(format!("the request cannot be made: {message}"))
            }
            Error::InvalidResponsePayload(_, error) => Failure::infrastructure(format!(
                "{} answered with something else than expected: {error}",
                self.url
            ))
            .help("are the server and this command of the same version?"),
            other => Failure::infrastructure(format!("{}: {other}", self.url)),
        }
    }

    /// The server could not be reached.
    pub fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let mut text = String::new();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text = cause.to_string();
            source = cause.source();
        }
        if text.is_empty() {
            text = error.to_string();
        }
        Failure::infrastructure(format!("cannot reach {}: {text}", self.url))
            .help("is it running? `sealci up` starts one here")
    }
}

/// What all our services' problem documents have in common.
#[derive(Deserialize)]
struct Problem {
    title: String,
    detail: Option<String>,
    #[serde(default)]
    errors: Vec<ProblemError>,
}

/// An error of a manifest, which the detail tells as well, or of a setting, which it does not.
#[derive(Deserialize)]
struct ProblemError {
    setting: Option<String>,
    message: String,
}

impl Problem {
    fn words(&self) -> String {
        let detail = self.detail.as_deref().unwrap_or(&self.title);
        // The detail of a bad manifest is the rendering of all its errors, over many lines.
        let mut words = if self.errors.is_empty() { one_line(detail) } else { lines(detail) };
        for error in &self.errors {
            if let Some(setting) = &error.setting {
                words.push_str(&format!("\n  {}: {}", one_line(setting), one_line(&error.message)));
            }
        }
        words
    }
}

/// A foreign text of several lines.
fn lines(text: &str) -> String {
    let mut shown = String::new();
    Harmless::new(false).push(text.as_bytes(), &mut shown);
    shown.trim_end().to_owned()
}

/// What a status and a problem document mean.
pub fn refused(url: &str, status: u16, body: &[u8]) -> Failure {
    let problem: Option<Problem> = serde_json::from_slice(body).ok();
    let exit = match status {
        401 | 403 => Exit::NotAllowed,
        408 | 425 | 429 => Exit::Infrastructure,
        400..=499 => Exit::Usage,
        _ => Exit::Infrastructure,
    };
    let said = problem.map_or_else(|| format!("{url} answered {status}"), |problem| problem.words());
    let failure = Failure::new(exit, said);
    match status {
        401 => failure.help("give a valid token with --token-file FILE or $SEALCI_TOKEN"),
        403 => failure.help("this needs a token with another role"),
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local() -> Option<ClientFile> {
        Some(ClientFile {
            controller: "http://127.0.0.1:8420".into(),
            monitor: "http://127.0.0.1:8421".into(),
            token: "local".into(),
        })
    }

    fn target(url: &str, token: Option<&str>) -> Target {
        Target { url: url.into(), token: token.map(Into::into) }
    }

    #[test]
    fn the_local_server_is_the_default() {
        let of = |service| choose(service, None, None, local()).unwrap();
        assert_eq!(of(Service::Controller), target("http://127.0.0.1:8420", Some("local")));
        assert_eq!(of(Service::Monitor), target("http://127.0.0.1:8421", Some("local")));
        let failure = choose(Service::Controller, None, None, None).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.help.unwrap().contains("sealci up"));
    }

    #[test]
    fn the_local_token_stays_local() {
        let of = |url: &str, token: Option<&str>| {
            choose(Service::Controller, Some(url.into()), token.map(Into::into), local()).unwrap()
        };
        assert_eq!(of("https://ci.example.org/", None), target("https://ci.example.org", None));
        assert_eq!(of("http://127.0.0.1:8420/", None), target("http://127.0.0.1:8420", Some("local")));
        assert_eq!(of("http://127.0.0.1:8420", Some("mine")), target("http://127.0.0.1:8420", Some("mine")));
        assert_eq!(of("http://127.0.0.1:9999", None), target("http://127.0.0.1:9999", None));
    }

    #[test]
    fn a_token_never_travels_in_the_clear() {
        let of = |url: &str, token: Option<&str>| {
            choose(Service::Controller, Some(url.into()), token.map(Into::into), None)
        };
        assert!(of("http://ci.example.org", Some("t")).is_err());
        assert!(of("http://10.0.0.1:80", Some("t")).is_err());
        for good in ["http://[::1]:8420", "http://localhost:1", "https://ci.example.org"] {
            assert!(of(good, Some("t")).is_ok(), "{good}");
        }
        assert!(of("http://ci.example.org", None).is_ok());
        for bad in ["ci.example.org:80", "ftp://x", ""] {
            assert_eq!(of(bad, None).unwrap_err().exit, Exit::Usage, "{bad}");
        }
    }

    #[test]
    fn a_refusal_has_its_exit_code_and_the_servers_words() {
        for (status, exit) in [
            (400, Exit::Usage),
            (401, Exit::NotAllowed),
            (403, Exit::NotAllowed),
            (404, Exit::Usage),
            (409, Exit::Usage),
            (422, Exit::Usage),
            (429, Exit::Infrastructure),
            (500, Exit::Infrastructure),
            (503, Exit::Infrastructure),
        ] {
            assert_eq!(refused("http://x", status, b"").exit, exit, "{status}");
        }
        let body = br#"{"title":"Bad setting","status":422,"detail":"a setting is wrong",
            "errors":[{"setting":"branches[1]","message":"empty"}]}"#;
        assert_eq!(refused("http://x", 422, body).message, "a setting is wrong\n  branches[1]: empty");
        let body = br#"{"title":"Bad manifest","status":422,"detail":"a.yaml:2:1: what\u001b[2J\n  | x\n",
            "errors":[{"file":"a.yaml","line":2,"column":1,"message":"what","help":"h","source_line":"x"}]}"#;
        let failure = refused("http://x", 422, body);
        assert_eq!(failure.message, "a.yaml:2:1: what\n  | x");
    }
}
