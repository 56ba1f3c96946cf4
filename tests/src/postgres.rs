//! Runs a PostgreSQL server of a test's own, which may be stopped hard and started again.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::host;

/// The server and its data, which go with this.
pub struct Postgres {
    folder: TempDir,
    programs: PathBuf,
    port: u16,
}

impl Postgres {
    /// Makes and starts one; why it cannot be had here otherwise.
    pub fn start() -> Result<Self, String> {
        let programs = newest_programs().ok_or("PostgreSQL is not installed")?;
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        if host::is_root() {
            // It refuses to run as root.
            let given = Command::new("chown").arg(account()).arg(folder.path()).status();
            given.map_err(|error| error.to_string())?;
        }
        // Another may take the port between here and there; then starting fails, and so does the test.
        let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(|error| error.to_string())?;
        let port = listener.local_addr().map_err(|error| error.to_string())?.port();
        drop(listener);
        let postgres = Self { folder, programs, port };
        postgres.run(
            "initdb",
            &["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"],
        )?;
        postgres.begin()?;
        Ok(postgres)
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Starts it; returns when it takes connections.
    pub fn begin(&self) -> Result<(), String> {
        let folder = self.folder.path().display();
        let options = format!("-h 127.0.0.1 -p {} -k {folder} -c max_connections=200", self.port);
        let log = self.folder.path().join("log");
        let log = log.display().to_string();
        self.run("pg_ctl", &["start", "-w", "-s", "-l", &log, "-o", &options])
    }

    /// Stops it as a crash would: nothing is finished, and the next start recovers.
    pub fn stop_immediately(&self) {
        self.run("pg_ctl", &["stop", "-m", "immediate", "-w", "-s"]).expect("it can be stopped");
    }

    /// What a query answers, unadorned.
    pub fn ask(&self, query: &str) -> String {
        let output = Command::new(self.programs.join("psql"))
            .args(["-X", "-A", "-t", "-d", &self.url(), "-c", query])
            .output()
            .expect("psql can be run");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<(), String> {
        let path = self.programs.join(program);
        let mut command = if host::is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", account(), "--regid", account(), "--clear-groups", "--"]).arg(path);
            command
        } else {
            Command::new(path)
        };
        command.args(arguments).arg("--pgdata").arg(self.folder.path().join("data"));
        // The server inherits what its starter has: a pipe would not end with it.
        let status = command
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .status()
            .map_err(|error| format!("{program}: {error}"))?;
        if status.success() { Ok(()) } else { Err(format!("{program} ended with {status}")) }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let _ = self.run("pg_ctl", &["stop", "-m", "immediate", "-s"]);
    }
}

/// Who runs it where root may not.
fn account() -> &'static str {
    let accounts = fs::read_to_string("/etc/passwd").unwrap_or_default();
    if accounts.lines().any(|line| line.starts_with("postgres:")) { "postgres" } else { "nobody" }
}

fn newest_programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let folders = versions.map(|entry| entry.path().join("bin"));
    folders.filter(|folder| folder.join("initdb").is_file()).max()
}
