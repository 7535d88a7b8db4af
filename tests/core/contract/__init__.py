"""The contract row by row, checked by what is sent. Other tests of the core have the details.

| # | situation |                                   | # | situation |
|---|-----------|                                   |---|-----------|
| 1 | a read outside |                              | 11 | `rollback()` outside |
| 2 | `begin()` after any number of reads |         | 12 | an error from the database outside |
| 3 | an exception inside |                         | 13 | `with_for_update` outside |
| 4 | `begin()` inside |                            | 14 | streaming outside |
| 5 | `begin_nested()` inside |                     | 15 | a request that waits between reads |
| 6 | `begin_nested()` outside |                    | 16 | `engine.connect()` without `begin()` |
| 7 | a read outside with changes waiting |         | 17 | `engine.begin()` |
| 8 | `flush()` or `commit()` outside |             | 18 | the log of `echo=True` |
| 9 | a call that sends several writing statements  | 19 | back in the pool |
| 10 | one Core statement that writes outside |     | 20 | a session on a `Connection` |
"""
