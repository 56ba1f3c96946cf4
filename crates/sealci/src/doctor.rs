//! The command `doctor`: what of SealCI works on this machine, what does not, and the Debian package that brings it.
//!
//! [`facts`] looks (files, programs, a user namespace that is really made, a cgroup that is really made); [`findings`]
//! judges, purely.

mod facts;

use clap::Args;
use sealci_microvm::{kernel, scratch};
use serde::Serialize;

use self::facts::{Cgroups, Facts};
use crate::exit::{Exit, Failure};
use crate::output;
use crate::terminal::Terminal;

#[derive(Debug, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    output: output::Args,
}

/// How well a thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Standing {
    Works,
    /// Something that not everyone needs is missing.
    Limited,
    /// Pipelines cannot run as they should.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    name: &'static str,
    standing: Standing,
    /// What is there.
    detail: String,
    /// What to do, where something is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
    /// The Debian package that brings it.
    #[serde(skip_serializing_if = "Option::is_none")]
    package: Option<&'static str>,
}

impl Finding {
    fn works(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, standing: Standing::Works, detail: detail.into(), mend: None, package: None }
    }

    fn lacks(
        name: &'static str,
        standing: Standing,
        detail: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self { name, standing, detail: detail.into(), mend: Some(mend.into()), package: None }
    }

    fn needs_package(
        name: &'static str,
        standing: Standing,
        detail: impl Into<String>,
        package: &'static str,
    ) -> Self {
        let mend = format!("apt-get install {package}");
        Self { package: Some(package), ..Self::lacks(name, standing, detail, mend) }
    }
}

pub async fn doctor(args: &DoctorArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let findings = findings(&Facts::look().await);
    args.output.print(&findings, || findings.iter().map(|finding| line(finding, terminal)).collect())?;
    let all_there = findings.iter().all(|finding| finding.standing != Standing::Missing);
    Ok(if all_there { Exit::Passed } else { Exit::Failed })
}

fn line(finding: &Finding, terminal: Terminal) -> String {
    let mark = match finding.standing {
        Standing::Works => terminal.green("ok     "),
        Standing::Limited => terminal.yellow("limited"),
        Standing::Missing => terminal.red("missing"),
    };
    let mend =
        finding.mend.as_ref().map(|mend| format!("\n         {:17} -> {mend}", "")).unwrap_or_default();
    format!("{mark}  {:17} {}{mend}\n", finding.name, finding.detail)
}

/// The oldest Git with everything that the workspace's hardening uses.
const GIT_MIN: (u32, u32) = (2, 31);

fn findings(facts: &Facts) -> Vec<Finding> {
    let mut all = vec![git(facts), cgroups(facts), user_namespaces(facts)];
    if facts.is_root {
        // An ordinary user's sandbox has no layer over the host's programs.
        all.push(overlay(facts));
    }
    all.push(images(facts));
    all.extend(network(facts));
    all.push(kvm(facts));
    if facts.kvm == Some(true) {
        all.extend(machines(facts));
    }
    all.extend(facts.daemon.as_ref().map(daemon));
    all
}

/// Only who asks for the executor `docker` needs one.
fn daemon(told: &Result<String, String>) -> Finding {
    let name = "container daemon";
    match told {
        Ok(what) => Finding::works(name, format!("{what}; name it by --docker-host to the agent")),
        Err(why) => Finding::lacks(
            name,
            Standing::Limited,
            why,
            "only actions with `executor: docker` need it; `container` runs images without one",
        ),
    }
}

fn git(facts: &Facts) -> Finding {
    match facts.git_version {
        None => Finding::needs_package("git", Standing::Missing, "not found", "git"),
        Some((major, minor)) if (major, minor) < GIT_MIN => {
            let detail = format!("{major}.{minor} is older than {}.{}", GIT_MIN.0, GIT_MIN.1);
            Finding::needs_package("git", Standing::Missing, detail, "git")
        }
        Some((major, minor)) => Finding::works("git", format!("{major}.{minor}")),
    }
}

fn cgroups(facts: &Facts) -> Finding {
    let version = match facts.cgroups {
        Cgroups::V2 => "version 2",
        Cgroups::V1 => "version 1",
        Cgroups::Hybrid => "versions 1 and 2 (hybrid)",
        Cgroups::None => {
            return Finding::lacks(
                "cgroups",
                Standing::Limited,
                "not mounted",
                "without them no limit holds: mount -t cgroup2 none /sys/fs/cgroup",
            );
        }
    };
    if facts.cgroups_writable {
        return Finding::works("cgroups", format!("{version}, writable"));
    }
    let mend = if facts.is_root {
        "a container's cgroups are often read-only: start it with its own cgroup namespace, writable"
    } else {
        "limits of CPU and memory need root, or a group given to the user (`systemd-run --user --scope -p Delegate=yes`)"
    };
    Finding::lacks(
        "cgroups",
        Standing::Limited,
        format!("{version}, not writable: limits are not enforced"),
        mend,
    )
}

fn user_namespaces(facts: &Facts) -> Finding {
    let name = "user namespaces";
    if facts.user_namespaces {
        return match &facts.sealing_problem {
            Some(problem) => Finding::lacks(
                name,
                Standing::Missing,
                problem,
                "what contains this machine forbids a part of it (a container's masked /proc, AppArmor): run as root",
            ),
            None => Finding::works(name, "work"),
        };
    }
    let mend = match (facts.max_user_namespaces, facts.unprivileged_user_namespaces) {
        (Some(0), _) => "sysctl -w user.max_user_namespaces=15000",
        (_, Some(false)) => "sysctl -w kernel.unprivileged_userns_clone=1",
        _ => "the kernel or what contains this machine forbids them: the sandbox cannot run here",
    };
    Finding::lacks(name, Standing::Missing, "cannot be made", mend)
}

fn overlay(facts: &Facts) -> Finding {
    if facts.overlay {
        Finding::works("overlay", "known to the kernel")
    } else {
        Finding::lacks("overlay", Standing::Missing, "not known to the kernel", "modprobe overlay")
    }
}

fn images(facts: &Facts) -> Finding {
    let name = "images";
    match &facts.stacking {
        Ok(None) => Finding::works(name, "their layers are stacked by the kernel"),
        Ok(Some(why)) => Finding::lacks(
            name,
            Standing::Limited,
            format!("their layers are copied for each action, which takes longer: {why}"),
            "keep them on a file system such as ext4: $XDG_CACHE_HOME for `sealci run`, --data elsewhere",
        ),
        Err(why) => Finding::lacks(
            name,
            Standing::Limited,
            format!("it cannot be tried how their layers are put together: {why}"),
            "mend what is missing above first",
        ),
    }
}

fn network(facts: &Facts) -> Vec<Finding> {
    if !facts.is_root {
        let name = "network (rootless)";
        if let Some(problem) = &facts.network_problem {
            let mend = "mend that as root; until then only actions with `network: off` run";
            return vec![Finding::lacks(name, Standing::Limited, problem, mend)];
        }
        return vec![match (facts.pasta, facts.slirp4netns) {
            (true, _) => Finding::works(name, "pasta"),
            (false, true) => Finding::works(name, "slirp4netns"),
            (false, false) => Finding::needs_package(
                name,
                Standing::Limited,
                "neither pasta nor slirp4netns: actions have no network",
                "passt",
            ),
        }];
    }
    let filter = match (facts.nft, facts.iptables) {
        (true, _) => Finding::works("packet filter", "nft"),
        (false, true) => Finding::works("packet filter", "iptables"),
        (false, false) => Finding::needs_package(
            "packet filter",
            Standing::Limited,
            "neither nft nor iptables: actions have no network",
            "nftables",
        ),
    };
    let ip = if facts.ip {
        Finding::works("ip", "found")
    } else {
        Finding::needs_package("ip", Standing::Limited, "not found: actions have no network", "iproute2")
    };
    vec![filter, ip]
}

fn kvm(facts: &Facts) -> Finding {
    match facts.kvm {
        Some(true) => {
            Finding::works("/dev/kvm", "opens; an agent with --microvms finds out whether machines run in it")
        }
        Some(false) => Finding::lacks(
            "/dev/kvm",
            Standing::Limited,
            "not usable by this user: no microVMs",
            "usermod -aG kvm $USER, and log in again",
        ),
        None => Finding::lacks(
            "/dev/kvm",
            Standing::Limited,
            "not there: no microVMs",
            "needs a machine, or nested virtualisation, with VT-x or AMD-V",
        ),
    }
}

/// What microVMs are made of, where the machine can run any.
fn machines(facts: &Facts) -> Vec<Finding> {
    let name = "microVM kernel";
    let kernel = match &facts.machine_kernel {
        Ok(release) => Finding::works(name, release),
        Err(why) => Finding::needs_package(name, Standing::Limited, why, kernel::PACKAGE),
    };
    let name = "microVM disks";
    let disks = if facts.makes_disks {
        Finding::works(name, "mkfs.ext4")
    } else {
        Finding::needs_package(name, Standing::Limited, "no mkfs.ext4", scratch::PACKAGE)
    };
    let name = "microVM network";
    let network = if facts.has_taps {
        Finding::works(name, "/dev/net/tun")
    } else {
        let problem = "/dev/net/tun is not usable: actions in microVMs have no network";
        Finding::lacks(name, Standing::Limited, problem, "as root: modprobe tun && chmod 0666 /dev/net/tun")
    };
    vec![kernel, disks, network]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            is_root: true,
            git_version: Some((2, 39)),
            cgroups: Cgroups::V2,
            cgroups_writable: true,
            user_namespaces: true,
            max_user_namespaces: Some(100),
            unprivileged_user_namespaces: None,
            sealing_problem: None,
            network_problem: None,
            overlay: true,
            stacking: Ok(None),
            nft: true,
            iptables: false,
            ip: true,
            pasta: false,
            slirp4netns: false,
            kvm: Some(true),
            machine_kernel: Ok("6.1.0-48-cloud-amd64".to_owned()),
            makes_disks: true,
            has_taps: true,
            daemon: Some(Ok("Docker 20.10".to_owned())),
        }
    }

    #[test]
    fn on_a_good_machine_everything_works() {
        assert!(
            findings(&good())
                .iter()
                .all(|finding| finding.standing == Standing::Works && finding.mend.is_none())
        );
    }

    #[test]
    fn what_is_missing_names_its_package() {
        let facts = Facts { git_version: None, nft: false, ip: false, ..good() };
        let packages: Vec<_> = findings(&facts).iter().filter_map(|finding| finding.package).collect();
        assert_eq!(packages, ["git", "nftables", "iproute2"]);
        let rootless = Facts { is_root: false, ..good() };
        let packages: Vec<_> = findings(&rootless).iter().filter_map(|finding| finding.package).collect();
        assert_eq!(packages, ["passt"]);
        let facts = Facts { machine_kernel: Err("none".to_owned()), makes_disks: false, ..good() };
        let packages: Vec<_> = findings(&facts).iter().filter_map(|finding| finding.package).collect();
        assert_eq!(packages, ["linux-image-cloud-amd64", "e2fsprogs"]);
        let without_taps = findings(&Facts { has_taps: false, ..good() });
        let mends: Vec<_> = without_taps.iter().filter_map(|finding| finding.mend.as_deref()).collect();
        assert!(matches!(mends[..], [mend] if mend.contains("modprobe tun")), "{mends:?}");
        // Nobody who cannot run microVMs is asked to install what they are made of.
        let facts = Facts { kvm: None, ..facts };
        assert!(findings(&facts).iter().all(|finding| finding.package.is_none()));
    }

    #[test]
    fn what_is_not_working_always_says_what_to_do() {
        let facts = Facts {
            git_version: Some((2, 20)),
            cgroups: Cgroups::Hybrid,
            cgroups_writable: false,
            user_namespaces: false,
            unprivileged_user_namespaces: Some(false),
            overlay: false,
            stacking: Ok(Some("ramfs".to_owned())),
            iptables: false,
            nft: false,
            kvm: None,
            daemon: Some(Err("nobody answers".to_owned())),
            ..good()
        };
        for finding in findings(&facts) {
            assert_eq!(finding.mend.is_some(), finding.standing != Standing::Works, "{finding:?}");
        }
        let namespaces = user_namespaces(&facts);
        assert!(namespaces.mend.unwrap().contains("unprivileged_userns_clone"));
    }

    #[tokio::test]
    async fn looking_at_this_machine_does_no_harm() {
        let facts = Facts::look().await;
        assert!(facts.git_version.is_some(), "the tests need git themselves");
    }
}
