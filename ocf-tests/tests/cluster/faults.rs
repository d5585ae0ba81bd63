//! Engines that die at any moment, under load.

use palisade_ocf_tests::{Turn, run, staged, top};

#[test]
fn no_acknowledged_write_is_lost_in_200_kills() {
    let _turn = Turn::take().unwrap();
    let stage = staged().unwrap().display().to_string();
    let program = top().join("ocf-tests/faults/kill-engines").display().to_string();
    let ran = run(&[program.as_str(), "--kills", "200", "--stage", &stage], "").unwrap();
    assert!(ran.success, "{}{}", ran.out, ran.err);
}
