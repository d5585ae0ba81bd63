//! The activity log as comment lines behind a dump (`dump-md` with ten `--verbose`): for the eye only.

use std::fmt::Write as _;

use palisade_metadata::al::{Transaction, TransactionKind};
use palisade_metadata::image::BlockIo;
use palisade_metadata::{BLOCK_SIZE, Block, Layout};

/// One line per block of the area, in the order on disk, with the transaction in it if there is one.
pub fn write(out: &mut dyn std::io::Write, io: &dyn BlockIo, layout: &Layout) -> std::io::Result<()> {
    writeln!(out, "# al {{")?;
    for nr in 0..layout.al_blocks() {
        let mut block = [0; BLOCK_SIZE];
        io.read_at(layout.al_block_pos(nr), &mut block)?;
        write!(out, "#     block {nr:2} {{{}", text(&block))?;
    }
    writeln!(out, "# }}")
}

fn text(block: &Block) -> String {
    let Some(transaction) = Transaction::decode(block) else { return " INVALID }\n".to_owned() };
    if transaction.kind == TransactionKind::Initialized {
        return " INITIALIZED }\n".to_owned();
    }
    let word = |at: usize| block.iter().skip(at).take(4).fold(0, |value, byte| value << 8 | u32::from(*byte));
    let mut text = format!(
        "\n# \tmagic: 0x{:08x}\n# \ttype: 0x{:04x}\n# \ttr: {:10}\n# \tactive set size: {}\n",
        word(0),
        word(12) >> 16,
        transaction.number,
        transaction.context_size
    );
    for (k, extent) in transaction.context.iter().enumerate() {
        let slot = usize::from(transaction.context_start) + k;
        let _ = writeln!(text, "# \t{k:2}: {slot:10} {extent:10}");
    }
    let _ = writeln!(text, "# \tupdates: {}", transaction.updates.len());
    for (k, update) in transaction.updates.iter().enumerate() {
        let _ = writeln!(text, "# \t{k:2}: {:10} {:10}", update.slot, update.extent);
    }
    let _ = writeln!(text, "# \tcrc32c: 0x{:08x}\n#     }}", word(8));
    text
}
