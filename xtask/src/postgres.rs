//! Runs a private PostgreSQL for the tests: its own data folder, its own port on loopback, its own password.
//!
//! It ends with its owner: stopped and its folder removed when dropped, and by the kernel if this process is killed.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::machine;

/// A running server.
pub struct Postgres {
    server: Child,
    folder: PathBuf,
    /// `postgres://…`, for tests.
    pub url: String,
}

/// The user under which it runs: PostgreSQL refuses root.
struct Account {
    uid: u32,
    gid: u32,
}

impl Postgres {
    /// Makes and starts one; returns when it accepts connections. A power cut would cost its data.
    pub fn start() -> Result<Self> {
        Self::start_with("off")
    }

    /// One that syncs what it commits, as those of users do.
    pub fn start_durable() -> Result<Self> {
        Self::start_with("on")
    }

    /// The number that a query answers.
    pub fn ask(&self, query: &str) -> Result<f64> {
        let programs = machine::postgres_programs().context("PostgreSQL is not installed")?;
        let output = Command::new(programs.join("psql"))
            .args(["-X", "-A", "-t", "-d", &self.url, "-c", query])
            .output()
            .context("cannot run psql")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let text = text.trim();
        text.parse()
            .with_context(|| format!("`{query}` gave `{text}`: {}", String::from_utf8_lossy(&output.stderr)))
    }

    fn start_with(fsync: &str) -> Result<Self> {
        let programs = machine::postgres_programs().context("PostgreSQL is not installed")?;
        let account = if machine::is_root() { Some(unprivileged_account()?) } else { None };
        let password = random_hexadecimal()?;
        let folder = std::env::temp_dir().join(format!("sealci-postgres-{}", &password[..12]));
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let started = start_in(&folder, &programs, account.as_ref(), &password, fsync);
        if started.is_err() {
            let _ = fs::remove_dir_all(&folder);
        }
        let (server, port) = started?;
        let url = format!("postgres://postgres:{password}@127.0.0.1:{port}/postgres");
        Ok(Self { server, folder, url })
    }
}

fn start_in(
    folder: &Path,
    programs: &Path,
    account: Option<&Account>,
    password: &str,
    fsync: &str,
) -> Result<(Child, u16)> {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))?;
    let password_file = folder.join("password");
    fs::write(&password_file, password)?;
    fs::set_permissions(&password_file, fs::Permissions::from_mode(0o600))?;
    if let Some(account) = account {
        for path in [folder, &password_file] {
            chown(path, Some(account.uid), Some(account.gid))?;
        }
    }
    let data = folder.join("data");
    let output = as_account(account, &programs.join("initdb"), folder)
        .args(["--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"])
        .arg("--pwfile")
        .arg(&password_file)
        .arg("--pgdata")
        .arg(&data)
        .output()
        .context("cannot run initdb")?;
    if !output.status.success() {
        bail!("initdb failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    // Another process may take the port between here and there; then the server says so, and the next one is tried.
    let mut refusals = String::new();
    for _ in 0..3 {
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        match serve(folder, programs, account, &data, port, fsync) {
            Ok(server) => return Ok((server, port)),
            Err(error) => refusals = format!("{error:#}"),
        }
    }
    bail!("PostgreSQL does not start: {refusals}")
}

fn serve(
    folder: &Path,
    programs: &Path,
    account: Option<&Account>,
    data: &Path,
    port: u16,
    fsync: &str,
) -> Result<Child> {
    let mut server = as_account(account, &programs.join("postgres"), folder)
        .arg("-D")
        .arg(data)
        .arg("-k")
        .arg(folder)
        .args(["-h", "127.0.0.1", "-p", &port.to_string()])
        // At LOG the server says when it is ready, and little else.
        .args(["-c", &format!("fsync={fsync}"), "-c", "max_connections=300", "-c", "log_min_messages=log"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run postgres")?;
    let (ready, readiness) = mpsc::channel();
    let stderr = server.stderr.take().context("postgres has no standard error")?;
    // It ends when the server closes its end.
    thread::spawn(move || read_until_closed(stderr, &ready));
    match readiness.recv_timeout(Duration::from_secs(30)) {
        Ok(Said::Ready) => Ok(server),
        Ok(Said::Closed(said)) => {
            let _ = server.wait();
            bail!("{}", said.trim())
        }
        Err(_) => {
            let _ = server.kill();
            let _ = server.wait();
            bail!("it was not ready within 30 s")
        }
    }
}

/// What the server's messages come to.
enum Said {
    Ready,
    Closed(String),
}

fn read_until_closed(stderr: impl Read, said: &mpsc::Sender<Said>) {
    let mut all = String::new();
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        if line.contains("ready to accept connections") {
            let _ = said.send(Said::Ready);
        } else if all.len() < 10_000 {
            all.push_str(&line);
            all.push('\n');
        }
    }
    let _ = said.send(Said::Closed(all));
}

/// A program under that account, which the kernel ends with us.
fn as_account(account: Option<&Account>, program: &Path, folder: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "INT"]);
    if let Some(Account { uid, gid }) = account {
        command.args(["--reuid", &uid.to_string(), "--regid", &gid.to_string(), "--clear-groups"]);
    }
    command
        .arg("--")
        .arg(program)
        .current_dir(folder)
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .stdin(Stdio::null());
    command
}

fn unprivileged_account() -> Result<Account> {
    let accounts = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
    let find = |name: &str| {
        accounts.lines().find_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            (fields.first() == Some(&name)).then(|| {
                Some(Account { uid: fields.get(2)?.parse().ok()?, gid: fields.get(3)?.parse().ok()? })
            })?
        })
    };
    find("postgres").or_else(|| find("nobody")).context("neither `postgres` nor `nobody` is in /etc/passwd")
}

fn random_hexadecimal() -> Result<String> {
    let mut bytes = [0_u8; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // SIGINT is its "fast" end: clients are cut off, nothing is left behind.
        let asked = Command::new("kill").args(["-INT", &self.server.id().to_string()]).status();
        if !asked.is_ok_and(|status| status.success()) {
            let _ = self.server.kill();
        }
        let _ = self.server.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_answers_and_leaves_nothing() {
        if machine::postgres_programs().is_none() {
            println!("SKIPPED: PostgreSQL is not installed");
            return;
        }
        let postgres = Postgres::start().unwrap();
        let (folder, server) = (postgres.folder.clone(), postgres.server.id());
        assert!(postgres.url.starts_with("postgres://postgres:"));
        assert!(folder.join("data/postmaster.pid").exists());
        drop(postgres);
        assert!(!folder.exists());
        assert!(!Path::new(&format!("/proc/{server}")).exists());
    }
}
