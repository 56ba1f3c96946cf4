//! Decides by name what may be reached.

use crate::spec::AllowedName;

/// The ports that are open where this name, in lower case, leads to: sorted, each once; none where it is not on the list.
pub fn ports_of(list: &[AllowedName], name: &str) -> Vec<u16> {
    let is_meant = |allowed: &&AllowedName| match name.strip_suffix(&*allowed.name) {
        Some("") => !allowed.below,
        Some(front) => allowed.below && front.len() > 1 && front.ends_with('.'),
        None => false,
    };
    let mut ports: Vec<u16> =
        list.iter().filter(is_meant).flat_map(|allowed| allowed.ports.clone()).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_met_whole_and_below() {
        let allowed = |name: &str, below, ports: &[u16]| AllowedName {
            name: name.to_owned(),
            below,
            ports: ports.to_vec(),
        };
        let list = [
            allowed("example.org", false, &[443, 80]),
            allowed("example.org", true, &[22]),
            allowed("git.example.org", false, &[9418, 22]),
        ];
        for (name, ports) in [
            ("example.org", vec![80, 443]),
            ("a.example.org", vec![22]),
            ("a.b.example.org", vec![22]),
            ("git.example.org", vec![22, 9418]),
            (".example.org", vec![]),
            ("notexample.org", vec![]),
            ("example.org.evil.net", vec![]),
            ("org", vec![]),
            ("", vec![]),
        ] {
            assert_eq!(ports_of(&list, name), ports, "{name}");
        }
    }
}
