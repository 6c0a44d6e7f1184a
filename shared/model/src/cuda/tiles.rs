//! The work of a batch's attention, as `cuda/attend.cu` takes it: tiles of queries, dealt to the blocks of threads.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Rows of a tile: neighbouring queries, each with all heads that share one head of keys.
pub(super) const TILE_ROWS: u32 = 128;
/// Keys that are multiplied at a time, or half of them at a sequence's end.
pub(super) const TILE_KEYS: u32 = 128;

/// How a model's queries are tiled on one GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tiling {
    /// Heads of queries that share one head of keys.
    pub group: u32,
    /// Queries of a tile.
    pub queries: u32,
    pub kv_heads: u32,
    /// Blocks of threads: one for each multiprocessor.
    pub blocks: u32,
}

/// Who does what.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Work {
    /// By block of threads, and one more: where its part of `tiles` begins.
    pub starts: Vec<i32>,
    /// Four numbers each: first query; first key; keys that the first query sees; queries, head and own rows of the last block of keys.
    pub tiles: Vec<[i32; 4]>,
}

/// A sequence; in this order of fields the longest comes last.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Sequence {
    keys: i32,
    query: i32,
    queries: i32,
    key: i32,
}

impl Tiling {
    /// Lists the tiles of sequences whose queries and keys begin and end at the given rows, with at least as many keys as queries each.
    ///
    /// Tiles that are worked on at a time read the same keys, the longest sequences come first, and each tile goes to the block that has
    /// least to do. Any dealing gives the same results; this one is fast.
    pub(super) fn deal(self, query_offsets: &[i32], key_offsets: &[i32]) -> Work {
        let mut sequences: Vec<Sequence> = query_offsets
            .array_windows()
            .zip(key_offsets.array_windows())
            .map(|([query, queries_end], [key, keys_end])| Sequence {
                keys: keys_end - key,
                query: *query,
                queries: queries_end - query,
                key: *key,
            })
            .filter(|sequence| sequence.queries > 0)
            .collect();
        sequences.sort_unstable_by(|a, b| b.cmp(a));
        let mut lists = vec![Vec::new(); self.blocks as usize];
        let mut loads: BinaryHeap<_> = (0..lists.len()).map(|block| Reverse((0, block))).collect();
        for sequence in &sequences {
            for head in 0..self.kv_heads {
                for (cost, tile) in self.tiles(sequence, head) {
                    let Some(mut least) = loads.peek_mut() else { continue };
                    let Reverse((load, block)) = &mut *least;
                    if let Some(list) = lists.get_mut(*block) {
                        list.push(tile);
                    }
                    *load += cost;
                }
            }
        }
        let ends = lists.iter().scan(0, |end, list| {
            *end += list.len();
            Some(super::layout::narrow(*end))
        });
        Work { starts: std::iter::once(0).chain(ends).collect(), tiles: lists.concat() }
    }

    /// Tiles of one head of keys, the last first, with the time that each takes: tenths of a block of keys.
    fn tiles(self, sequence: &Sequence, head: u32) -> impl Iterator<Item = (i32, [i32; 4])> {
        let Sequence { keys, query, queries, key } = *sequence;
        let [step, block, head] = [self.queries, TILE_KEYS, head].map(u32::cast_signed);
        (0..(queries + step - 1) / step).rev().map(move |tile| {
            let at = tile * step;
            let count = step.min(queries - at);
            let seen = at + (keys - queries) + 1;
            let most = seen + count - 1;
            let own = block.min(keys - (most - 1) / block * block);
            // Half blocks, and as long as four tenths of one for what comes with each tile.
            let cost = (most + block / 2 - 1) / (block / 2) * 5 + 4;
            (cost, [query + at, key, seen, count | head << 8 | own << 16])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const QWEN_7B: Tiling = Tiling { group: 7, queries: 18, kv_heads: 4, blocks: 132 };

    /// Offsets of sequences with the given numbers of queries and of keys.
    fn offsets(pairs: &[(i32, i32)]) -> [Vec<i32>; 2] {
        let ends = |lengths: Vec<i32>| {
            let ends = lengths.into_iter().scan(0, |end, length| {
                *end += length;
                Some(*end)
            });
            std::iter::once(0).chain(ends).collect::<Vec<_>>()
        };
        [ends(pairs.iter().map(|(queries, _)| *queries).collect()), ends(pairs.iter().map(|(_, keys)| *keys).collect())]
    }

    /// As `deploy/gpu/attend.py` lists it, whose results were compared on a GPU.
    #[test]
    fn tiles_are_those_of_the_measured_program() {
        let [queries, keys] = offsets(&[(20, 20), (5, 130), (1, 21)]);
        let work = Tiling { kv_heads: 2, blocks: 3, ..QWEN_7B }.deal(&queries, &keys);
        assert_eq!(
            work,
            Work {
                starts: vec![0, 2, 4, 8],
                tiles: vec![
                    [20, 20, 126, 131077],
                    [0, 0, 1, 1310738],
                    [20, 20, 126, 131333],
                    [18, 0, 19, 1310978],
                    [25, 150, 21, 1376257],
                    [25, 150, 21, 1376513],
                    [18, 0, 19, 1310722],
                    [0, 0, 1, 1310994]
                ]
            }
        );
    }

    #[test]
    fn every_query_and_head_is_dealt_once() {
        let pairs = [(130, 130), (1, 131), (257, 387), (640, 770), (99, 99), (0, 0), (18, 18), (36, 164), (19, 147)];
        let [queries, keys] = offsets(&pairs);
        for tiling in
            [QWEN_7B, Tiling { group: 6, queries: 21, kv_heads: 2, ..QWEN_7B }, Tiling { blocks: 1, ..QWEN_7B }]
        {
            let Work { starts, tiles } = tiling.deal(&queries, &keys);
            assert_eq!(starts.len(), tiling.blocks as usize + 1);
            assert!(starts.is_sorted() && starts.last() == i32::try_from(tiles.len()).ok().as_ref());
            let mut seen = BTreeMap::new();
            for [query, key, sees, what] in tiles {
                let (count, head, own) = (what & 0xff, what >> 8 & 0xff, what >> 16);
                let most = sees + count - 1;
                let sequence = queries.partition_point(|offset| *offset <= query) - 1;
                assert_eq!(key, keys[sequence]);
                assert!(count >= 1 && query + count <= queries[sequence + 1]);
                // What is behind the last block's own rows is another sequence's, and all that is seen lies before.
                let blocks = (most + 127) / 128;
                assert!((1..=128).contains(&own) && (blocks - 1) * 128 + own >= most);
                assert!(
                    (blocks - 1) * 128 + own == blocks * 128 || key + (blocks - 1) * 128 + own == keys[sequence + 1]
                );
                for at in 0..count {
                    assert_eq!(seen.insert((query + at, head), sees + at), None);
                }
            }
            let expected = pairs.iter().zip(&queries).flat_map(|((own, keys), first)| {
                (0..*own).flat_map(move |at| {
                    (0..tiling.kv_heads as i32).map(move |head| ((first + at, head), keys - own + at + 1))
                })
            });
            assert_eq!(seen, expected.collect());
        }
    }
}
