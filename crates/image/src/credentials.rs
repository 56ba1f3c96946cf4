//! Logins for registries, from a docker config file (`~/.docker/config.json`, as `docker login` and `podman login` write it).
//!
//! Only what stands in the file is used. A credential helper is a program that somebody else chose; it is not run.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use secrecy::SecretString;
use serde::Deserialize;

use crate::reference::DEFAULT_REGISTRY;

/// By registry, or by registry and the beginning of a repository's name (podman's way).
#[derive(Clone, Default)]
pub struct Credentials {
    logins: BTreeMap<String, Login>,
}

#[derive(Clone)]
/// How somebody shows who they are.
pub enum Login {
    Password {
        user: String,
        password: SecretString,
    },
    /// An OAuth 2 refresh token.
    IdentityToken(SecretString),
    /// Kept by a program; its name.
    Helper(String),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsError {
    /// Without the file's text: it holds passwords.
    #[error("this is no docker config file: not JSON of its form at line {line}, column {column}")]
    Form { line: usize, column: usize },
    #[error("the login for {registry} is not `user:password` in base64; log in again")]
    Login { registry: String },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawConfig {
    #[serde(default)]
    auths: BTreeMap<String, RawLogin>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default)]
    creds_store: Option<String>,
}

#[derive(Deserialize)]
struct RawLogin {
    #[serde(default, deserialize_with = "secret")]
    auth: Option<SecretString>,
    username: Option<String>,
    #[serde(default, deserialize_with = "secret")]
    password: Option<SecretString>,
    #[serde(default, deserialize_with = "secret")]
    identitytoken: Option<SecretString>,
}

fn secret<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<SecretString>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(SecretString::from))
}

impl Credentials {
    /// The text of a docker config file.
    pub fn from_docker_config(text: &str) -> Result<Self, CredentialsError> {
        let raw: RawConfig = serde_json::from_str(text)
            .map_err(|error| CredentialsError::Form { line: error.line(), column: error.column() })?;
        let mut logins = BTreeMap::new();
        for (registry, login) in raw.auths {
            let login = match login.read() {
                Ok(Some(login)) => Some(login),
                // With a store the file names the registry only.
                Ok(None) => raw.creds_store.clone().filter(|store| !store.is_empty()).map(Login::Helper),
                Err(()) => return Err(CredentialsError::Login { registry: place(&registry) }),
            };
            if let Some(login) = login {
                logins.insert(place(&registry), login);
            }
        }
        for (registry, helper) in raw.cred_helpers {
            logins.entry(place(&registry)).or_insert(Login::Helper(helper));
        }
        Ok(Self { logins })
    }

    /// Adds or replaces one.
    pub fn insert(&mut self, registry: &str, user: &str, password: SecretString) {
        self.logins.insert(place(registry), Login::Password { user: user.to_owned(), password });
    }

    /// The most exact one for a repository.
    pub fn login(&self, registry: &str, repository: &str) -> Option<&Login> {
        let mut name = format!("{registry}/{repository}");
        loop {
            if let Some(login) = self.logins.get(&name) {
                return Some(login);
            }
            name.truncate(name.rfind('/')?);
        }
    }
}

/// Which registries, not how.
impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_set().entries(self.logins.keys()).finish()
    }
}

impl RawLogin {
    fn read(self) -> Result<Option<Login>, ()> {
        use secrecy::ExposeSecret as _;
        let is_given = |secret: &SecretString| !secret.expose_secret().is_empty();
        if let Some(token) = self.identitytoken.filter(is_given) {
            return Ok(Some(Login::IdentityToken(token)));
        }
        if let Some(auth) = self.auth.filter(is_given) {
            let bytes = STANDARD.decode(auth.expose_secret().trim()).map_err(drop)?;
            let text = String::from_utf8(bytes).map_err(drop)?;
            let (user, password) = text.split_once(':').ok_or(())?;
            // `docker login` once wrote zero bytes behind it.
            let password = password.trim_end_matches('\0').to_owned().into();
            return Ok(Some(Login::Password { user: user.to_owned(), password }));
        }
        Ok(match (self.username, self.password) {
            (Some(user), Some(password)) => Some(Login::Password { user, password }),
            _ => None,
        })
    }
}

/// `https://index.docker.io/v1/` → `docker.io`.
fn place(key: &str) -> String {
    let key = key.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let (host, path) = key.split_once('/').unwrap_or((key, ""));
    let host = match host {
        "index.docker.io" | "registry-1.docker.io" => DEFAULT_REGISTRY,
        host => host,
    };
    if matches!(path, "" | "v1" | "v2") { host.to_owned() } else { format!("{host}/{path}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret as _;

    fn shown(login: Option<&Login>) -> String {
        match login {
            None => "none".to_owned(),
            Some(Login::Password { user, password }) => format!("{user}:{}", password.expose_secret()),
            Some(Login::IdentityToken(token)) => format!("token {}", token.expose_secret()),
            Some(Login::Helper(name)) => format!("helper {name}"),
        }
    }

    #[test]
    fn a_docker_config_file_is_read() {
        let text = r#"{"auths":{
              "https://index.docker.io/v1/":{"auth":"bWU6cGFzczp3b3Jk"},
              "registry.example.org:5000":{"username":"a","password":"b"},
              "registry.example.org:5000/team":{"auth":"dGVhbTp4"},
              "token.example.org":{"auth":"eDp5","identitytoken":"t"},
              "stored.example.org":{}},
            "credHelpers":{"ecr.example.org":"ecr-login"},"credsStore":"desktop","HttpHeaders":{}}"#;
        let credentials = Credentials::from_docker_config(text).unwrap();
        let login = |registry, repository| shown(credentials.login(registry, repository));
        assert_eq!(login("docker.io", "library/debian"), "me:pass:word");
        assert_eq!(login("registry.example.org:5000", "other/x"), "a:b");
        assert_eq!(login("registry.example.org:5000", "team/x"), "team:x");
        assert_eq!(login("token.example.org", "x"), "token t");
        assert_eq!(login("stored.example.org", "x"), "helper desktop");
        assert_eq!(login("ecr.example.org", "x"), "helper ecr-login");
        assert_eq!(login("elsewhere.example.org", "x"), "none");
        let debug = format!("{credentials:?}");
        assert!(debug.contains("docker.io") && !debug.contains("word"), "{debug}");
    }

    #[test]
    fn what_is_wrong_is_told_without_the_secret() {
        let error = Credentials::from_docker_config("{\"auths\":{\"a\":{\"auth\":\"hunter2 }").unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
        let error =
            Credentials::from_docker_config(r#"{"auths":{"a":{"auth":"hunter2hunter2"}}}"#).unwrap_err();
        assert!(
            error.to_string().contains("login for a") && !error.to_string().contains("hunter2"),
            "{error}"
        );
    }
}
