//! Tests as an ordinary user: how they become one, and what a sandbox without root does differently.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use sealci_agent::executor::Executor;
use sealci_agent::executor::cgroup::Cgroups;
use sealci_agent::executor::container::{ContainerExecutor, ContainerOptions};
use sealci_agent::executor::helper::HelperCommand;
use sealci_agent::executor::sandbox::SandboxExecutor;
use sealci_agent::executor::sealed::{Sealer, SealerOptions};
use sealci_core::outcome::Outcome;
use sealci_sandbox::{Relay, RelayKind};
use tempfile::TempDir;

use crate::daemons;
use crate::images::{self, TestImages};
use crate::lab::{Lab, PIDS, cgroups, outside_address, skip};
use crate::network::Outside;
use crate::sealing::script;

/// Nobody's on any machine.
const USER: &str = "64999";
/// Where this user finds the helper, when not where it was built.
const HELPER: &str = "SEALCI_TEST_HELPER";

impl Lab {
    /// `sandbox` made by an ordinary user. As root this runs the same test once more as such a user, and has no lab.
    pub fn rootless() -> Option<Self> {
        Self::rootless_sandbox(None)
    }

    /// [`Lab::rootless`], for the tests that try to break out of it.
    pub fn rootless_sealed() -> Option<Self> {
        Self::rootless_sandbox(None)
    }

    /// [`Lab::rootless`] with a way outwards, by pasta.
    pub fn rootless_pasta() -> Option<Self> {
        Self::rootless_sandbox(Some(RelayKind::Pasta))
    }

    /// [`Lab::rootless`] with a way outwards, by slirp4netns.
    pub fn rootless_slirp4netns() -> Option<Self> {
        Self::rootless_sandbox(Some(RelayKind::Slirp4netns))
    }

    /// [`Lab::rootless`] with limits, in a control group that was given to the user. Root gives none: whoever starts the
    /// tests as a user does.
    pub fn rootless_limited() -> Option<Self> {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        if nix::unistd::geteuid().is_root() {
            skip(
                "delegation",
                &name,
                "it is for an ordinary user who was given a control group of version 2",
            );
            return None;
        }
        let (cgroups, folders, instance) = cgroups("delegation")?;
        let mut lab = Self::rootless_limits(None, Some(cgroups), |sealer| {
            Box::new(SandboxExecutor::new(sealer, Vec::new()))
        })?;
        lab.limits = true;
        lab.cgroup_folders = folders;
        lab.instance = instance;
        Some(lab)
    }

    /// `docker` of an agent that is not root's. As root this runs the same test once more as such a user, and has no lab.
    pub fn docker_as_user() -> Option<Self> {
        let socket = daemons::socket()?;
        if nix::unistd::geteuid().is_root() {
            std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
            let folder = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(socket.parent().unwrap(), folder).unwrap();
            let name = std::thread::current().name().unwrap_or_default().to_owned();
            run_as_user(&name, None, Some((daemons::GIVEN, socket.display().to_string())));
            return None;
        }
        Self::docker_at(&socket)
    }

    /// `container` made by an ordinary user.
    pub fn rootless_container() -> Option<Self> {
        Self::rootless_image(ContainerOptions::default(), None)
    }

    /// [`Lab::rootless_container`], for the tests that try to break out of it.
    pub fn rootless_container_sealed() -> Option<Self> {
        Self::rootless_image(ContainerOptions::default(), None)
    }

    /// [`Lab::rootless_container`] where layers are copied.
    pub fn rootless_container_copied() -> Option<Self> {
        Self::rootless_image(ContainerOptions { copies_layers: true, ..ContainerOptions::default() }, None)
    }

    /// [`Lab::rootless_container`] with a way outwards, by pasta.
    pub fn rootless_container_pasta() -> Option<Self> {
        Self::rootless_image(ContainerOptions::default(), Some(RelayKind::Pasta))
    }

    /// [`Lab::rootless_container`] with a way outwards, by slirp4netns.
    pub fn rootless_container_slirp4netns() -> Option<Self> {
        Self::rootless_image(ContainerOptions::default(), Some(RelayKind::Slirp4netns))
    }

    /// [`Lab::rootless_container`] with a real store of images.
    pub fn rootless_container_stored() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let path = folder.path().to_owned();
        let mut lab = Self::rootless_with(None, move |sealer| {
            let store = Arc::new(TestImages::stored(&path));
            Box::new(ContainerExecutor::new(sealer, store, ContainerOptions::default()).unwrap())
        })?;
        lab.shown = folder;
        Some(lab)
    }

    fn rootless_sandbox(relay: Option<RelayKind>) -> Option<Self> {
        let shown = TempDir::new().unwrap();
        std::fs::write(shown.path().join("tool"), "a tool\n").unwrap();
        let extra_paths = vec![shown.path().to_owned()];
        let mut lab =
            Self::rootless_with(relay, |sealer| Box::new(SandboxExecutor::new(sealer, extra_paths)))?;
        lab.shown = shown;
        Some(lab)
    }

    fn rootless_image(options: ContainerOptions, relay: Option<RelayKind>) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            let images = Arc::new(TestImages::new());
            let own = images.clone();
            let mut lab = Self::rootless_with(relay, move |sealer| {
                let copies = options.copies_layers;
                let executor = ContainerExecutor::new(sealer, own, options).unwrap();
                assert_eq!(
                    executor.stacking_problem().is_some(),
                    copies,
                    "{:?}",
                    executor.stacking_problem()
                );
                Box::new(executor)
            })?;
            lab.images = images;
            return Some(lab);
        }
        Self::rootless_with(relay, |_| unreachable!("root only starts the test anew"))
    }

    fn rootless_with(
        relay: Option<RelayKind>,
        make: impl FnOnce(Sealer) -> Box<dyn Executor>,
    ) -> Option<Self> {
        Self::rootless_limits(relay, None, make)
    }

    fn rootless_limits(
        relay: Option<RelayKind>,
        cgroups: Option<Cgroups>,
        make: impl FnOnce(Sealer) -> Box<dyn Executor>,
    ) -> Option<Self> {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        if let Err(why) = relay.map_or(Ok(()), |kind| Relay::find(Some(kind)).map(drop)) {
            skip("rootless", &name, &why.to_string());
            return None;
        }
        if nix::unistd::geteuid().is_root() {
            run_as_user(&name, relay, None);
            return None;
        }
        let folder = TempDir::new().unwrap();
        let options = SealerOptions {
            helper: HelperCommand { program: helper(), arguments: Vec::new() },
            pids: PIDS,
            network: relay.is_some(),
            relay,
            resolvers: Some(vec![outside_address()]),
        };
        let sealer = match Sealer::rootless(folder.path(), cgroups, options) {
            Ok(sealer) => sealer,
            Err(error) => {
                skip("rootless", &name, &error.to_string());
                return None;
            }
        };
        assert_eq!(sealer.network_problem().is_none(), relay.is_some(), "{:?}", sealer.network_problem());
        Some(Self::of(make(sealer), folder, None))
    }
}

fn helper() -> PathBuf {
    std::env::var_os(HELPER).map_or_else(|| env!("CARGO_BIN_EXE_sealci-sandbox-helper").into(), PathBuf::from)
}

/// Runs this binary's test of this name as an ordinary user, to whom the folders that it was built in may be closed: a
/// mount namespace shows it where it is open. `/dev/net/tun` is there for everyone, as udev makes it.
pub fn run_as_user(name: &str, relay: Option<RelayKind>, given: Option<(&str, String)>) {
    let open = TempDir::new().unwrap();
    std::fs::set_permissions(open.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for file in ["test", "helper"] {
        std::fs::write(open.path().join(file), b"").unwrap();
    }
    let image = images::tools_of(USER.parse().unwrap());
    std::fs::create_dir(open.path().join("image")).unwrap();
    let outside = relay.and_then(|_| Outside::make());
    let tunnel = if relay.is_some() {
        "mkdir -p /dev/net && mount -t tmpfs -o mode=755 none /dev/net && mknod -m 666 /dev/net/tun c 10 200 &&"
    } else {
        ""
    };
    let text = format!(
        "mount --bind \"$1\" \"$3/test\" && mount --bind \"$2\" \"$3/helper\" && \
         mount --bind \"$5\" \"$3/image\" && {tunnel} \
         exec setpriv --reuid {USER} --regid {USER} --clear-groups \
         \"$3/test\" --exact \"$4\" --nocapture --test-threads=1"
    );
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &text, "sh"])
        .arg(std::env::current_exe().unwrap())
        .arg(env!("CARGO_BIN_EXE_sealci-sandbox-helper"))
        .args([open.path(), Path::new(name), &image])
        .env(HELPER, open.path().join("helper"))
        .env(images::GIVEN, open.path().join("image"))
        .envs(outside.as_ref().map(Outside::variable))
        .envs(given)
        .env_remove("SEALCI_SKIPS")
        .current_dir("/")
        .output();
    match output {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success() && said.contains("1 passed"), "{}: {said}{text}", output.status);
            if let Some(line) = text.lines().find(|line| line.starts_with("SKIPPED")) {
                skip("rootless", name, line);
            }
        }
        Err(error) => skip("rootless", name, &format!("`unshare` (apt-get install util-linux): {error}")),
    }
}

/// Everything of the host is read-only, and what is not of the host is thrown away.
pub async fn nothing_of_the_host_is_changed(lab: &Lab) {
    let marker = format!("sealci-test-{}", crate::lab::random_action());
    let record = script(
        lab,
        &format!(
            "for d in / /usr /usr/bin /usr/local/bin /etc /var /opt /dev /run /proc /sys /home /lib/ /bin/ /etc/ssl /etc/alternatives; do \
             {{ echo x >$d/{marker}; }} 2>/dev/null || true; done; \
             rm -f /usr/bin/env 2>/dev/null || true; test -e /usr/bin/env; ! test -w /usr; echo x >>/etc/passwd; echo went on"
        ),
    )
    .await;
    assert_eq!(record.text(), "went on\n");
    for folder in
        ["/", "/usr", "/usr/bin", "/etc", "/var", "/opt", "/dev", "/run", "/home", "/lib", "/etc/ssl"]
    {
        assert!(!Path::new(folder).join(&marker).exists(), "{folder}");
    }
    for path in ["/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"] {
        let record = lab.run_commands([format!("echo x >{path}")]).await;
        assert!(matches!(record.outcome(), Outcome::Failed { .. }), "{path}: {}", record.text());
    }
}

pub async fn common_tools_work(lab: &Lab) {
    let record = script(
        lab,
        "test \"$HOME\" = /root; cd; pwd; echo x >$TMPDIR/x; cat /var/tmp/x; stat -c %U:%G /workspace /etc/passwd /tmp / | sort -u; \
         touch /dev/shm/x; echo x >/dev/null; head -c 4 /dev/urandom | wc -c; test -w /dev/full; \
         cat /etc/hostname | wc -l; getent hosts localhost | wc -l",
    )
    .await;
    assert_eq!(record.text(), "/root\nx\nroot:root\n4\n1\n1\n");
    if Path::new("/usr/bin/git").exists() {
        let record = script(lab, "cd /workspace && git init -q . && git -c user.name=a -c user.email=b commit -q --allow-empty -m x && git log --oneline | wc -l").await;
        assert_eq!(record.text(), "1\n");
    }
    if Path::new("/usr/bin/cc").exists() {
        let record = script(lab, "echo 'int puts(const char *); int main(void) { return puts(\"compiled\") < 0; }' >a.c && cc a.c -o a && ./a").await;
        assert_eq!(record.text(), "compiled\n");
    }
    if Path::new("/usr/bin/script").exists() {
        let record = script(lab, "script -qec 'tty >/dev/null && echo terminal' /dev/null").await;
        assert_eq!(record.text().trim(), "terminal");
    }
}

/// Their number is limited without a control group, for this action alone.
pub async fn processes_are_counted(lab: &Lab) {
    let mut request = lab.request(["i=0; while [ $i -lt 400 ]; do sleep 100 & i=$((i+1)); done; echo all"]);
    request.timeout = Duration::from_secs(20);
    let record = lab.run(request).await;
    assert!(matches!(record.outcome(), Outcome::Failed { .. }), "{record:?}");
    assert!(!record.text().contains("all\n"), "{}", record.text());
}
