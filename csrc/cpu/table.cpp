// Compiled once per instruction set: its table of kernels.
#include <type_traits>

#include "../kernels.h"

namespace rk {
namespace RK_ISA {

template <class Pointer>
using As = std::remove_pointer_t<Pointer>;  // what the table declares

As<decltype(Kernels::select_columns)> select_columns;
As<decltype(Kernels::gram)> gram;
As<decltype(Kernels::row_sq_distances)> row_sq_distances;
As<decltype(Kernels::sq_distances_to_average)> sq_distances_to_average;
As<decltype(Kernels::weighted_row_sum)> weighted_row_sum;
As<decltype(Kernels::update_momenta)> update_momenta;
As<decltype(Kernels::read_pass)> read_pass;
As<decltype(Kernels::digest)> digest;

extern const Kernels table;
const Kernels table{RK_ISA_NAME,    select_columns, gram,  row_sq_distances, sq_distances_to_average, weighted_row_sum,
                    update_momenta, read_pass,      digest};

}  // namespace RK_ISA
}  // namespace rk
