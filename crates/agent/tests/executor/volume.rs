//! Much of it: bytes, commands, executions.

use sealci_agent::executor::ExecutionEvent;
use sealci_core::outcome::Outcome;

use crate::lab::{Lab, Record};

pub async fn bytes_arrive_as_written(lab: &Lab) {
    let request = lab.request(["cat data", "printf 'no newline'", "printf 'a\\0b\\377'"]);
    let data: Vec<u8> = (0..300_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    std::fs::write(request.workspace.join("data"), &data).unwrap();
    let record = lab.run(request).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded);
    let first = record.commands[0].end.unwrap() as usize;
    assert!(record.output[..first] == data);
    assert_eq!(&record.output[first..], b"no newlinea\0b\xff");
}

pub async fn a_hundred_megabytes_arrive_whole(lab: &Lab) {
    const LINES: usize = 12_500_000;
    const LARGEST: usize = 128 << 10;
    let pattern = b"1234567\n".repeat(LARGEST / 8 + 1);
    let mut execution = lab.start(lab.request([format!("yes 1234567 | head -n {LINES}")])).await;
    let (mut length, mut outcome) = (0, None);
    while let Some(event) = execution.next().await {
        match event {
            ExecutionEvent::Output(bytes) => {
                // With a bounded number of events in flight this bounds the memory.
                assert!(bytes.len() <= LARGEST, "{}", bytes.len());
                let start = length % 8;
                assert!(bytes == pattern[start..start + bytes.len()], "differs after byte {length}");
                length += bytes.len();
            }
            ExecutionEvent::CommandFinished { log_offset, .. } => assert_eq!(log_offset, LINES as u64 * 8),
            ExecutionEvent::Finished { outcome: end, .. } => outcome = Some(end),
            _ => {}
        }
    }
    assert_eq!(outcome, Some(Outcome::Succeeded));
    assert_eq!(length, LINES * 8);
}

pub async fn a_thousand_commands_run(lab: &Lab) {
    let record = lab.run_commands((0..1000).map(|index| format!("echo {index}"))).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded);
    assert_eq!(record.commands.len(), 1000);
    for index in 0..1000 {
        assert_eq!(record.output_of(index), format!("{index}\n"));
    }
}

pub async fn many_run_side_by_side(lab: &Lab) {
    let mut executions = Vec::new();
    for index in 0..40 {
        executions.push(lab.start(lab.request([format!("echo {index}; exit {index}")])).await);
    }
    for (index, mut execution) in executions.into_iter().enumerate() {
        let record = Record::of(&mut execution).await;
        assert_eq!(record.text(), format!("{index}\n"), "{:?}", record.outcome());
        match record.outcome() {
            Outcome::Succeeded => assert_eq!(index, 0),
            Outcome::Failed { exit_code, .. } => assert_eq!(*exit_code, index as i32),
            other => panic!("{other:?}"),
        }
    }
}
